"""Launches that begin while the one ahead of them in their stream ends: programmatic dependent launch.

Such a launch is set up meanwhile, and its kernel waits on the device for the one ahead before it reads or
writes any memory; a stream's order holds as ever. ``PARALLAX_EARLY_LAUNCH=0`` turns it off, and :func:`allow`
for a while.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MINIMUM_CAPABILITY = (9, 0)
MINIMUM_DRIVER = 12040
"""From here on CUDA graphs hold such launches too."""

_allowed = ContextVar("early launches", default=os.environ.get("PARALLAX_EARLY_LAUNCH", "1") != "0")
allowed = _allowed.get
"""Whether launches of the running thread or task are early."""


@contextmanager
def allow(early: bool) -> Iterator[None]:
    """Whether launches inside may be early."""
    token = _allowed.set(early)
    try:
        yield
    finally:
        _allowed.reset(token)


def supported(capability: tuple[int, int]) -> bool:
    """Whether the driver and a device of that capability can."""
    return capability >= MINIMUM_CAPABILITY and _driver_version() >= MINIMUM_DRIVER


@functools.cache
def _driver_version() -> int:
    from cupy.cuda import runtime

    return runtime.driverGetVersion()


class EarlyLaunch:
    """The launch of a kernel in one shape; not for several threads at once."""

    def __init__(self, function: int, grid: tuple[int, int, int], threads: int, shared_bytes: int):
        from cuda.bindings import driver

        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = self._config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.attrs, config.numAttrs = [attribute], 1
        self._function, self._launch = function, driver.cuLaunchKernelEx

    def launch(self, stream: int, arguments: int) -> None:
        """Launch on a stream. arguments: the address of those of the kernel."""
        self._config.hStream = stream
        (error,) = self._launch(self._config, self._function, arguments, 0)
        if error:
            raise RuntimeError(f"cuLaunchKernelEx: {error.name}")

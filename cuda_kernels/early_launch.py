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

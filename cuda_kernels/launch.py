"""The launch of a kernel in one shape, of the kind that suits it."""

from __future__ import annotations

import enum

from cuda.bindings import driver

from . import early_launch


class Kind(enum.Enum):
    """How a launch stands to the one ahead of it in its stream, and its blocks to one another."""

    PLAIN = enum.auto()
    EARLY = enum.auto()
    """It may begin while the one ahead ends; see :mod:`early_launch`."""
    TOGETHER = enum.auto()
    """Its blocks wait for one another: all run at once, or the launch fails."""


class Launch:
    """Launches a kernel in one shape; not for several threads at once.

    early: whether it may begin while the launch ahead of it ends, where :mod:`early_launch` allows. together:
    whether its blocks wait for one another, so that all must run at once; such a launch is never early.
    """

    def __init__(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        *,
        early: bool,
        together: bool = False,
    ):
        shape = function, grid, threads, shared_bytes
        self._usual = Prepared(*shape, Kind.TOGETHER if together else Kind.PLAIN)
        self._early = Prepared(*shape, Kind.EARLY) if early and not together else None

    def __call__(self, stream: int, arguments: int) -> None:
        """Launch on a stream of the current device. arguments: the address of those of the kernel."""
        if self._early is not None and early_launch.allowed():
            self._early.launch(stream, arguments)
        else:
            self._usual.launch(stream, arguments)


class Prepared:
    """A launch of one shape and kind, ready for the driver; not for several threads at once."""

    def __init__(
        self, function: int, grid: tuple[int, int, int], threads: int, shared_bytes: int, kind: Kind
    ):
        config = self._config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        if kind is not Kind.PLAIN:
            attribute, ids = driver.CUlaunchAttribute(), driver.CUlaunchAttributeID
            if kind is Kind.EARLY:
                attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                attribute.value.programmaticStreamSerializationAllowed = 1
            else:
                attribute.id = ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
                attribute.value.cooperative = 1
            config.attrs, config.numAttrs = [attribute], 1
        self._function, self._launch = function, driver.cuLaunchKernelEx

    def launch(self, stream: int, arguments: int) -> None:
        """Launch on a stream. arguments: the address of those of the kernel.

        Raises RuntimeError where the driver refuses, MemoryError where the device has no room.
        """
        self._config.hStream = stream
        (error,) = self._launch(self._config, self._function, arguments, 0)
        if error:
            no_memory = error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
            raise (MemoryError if no_memory else RuntimeError)(f"cuLaunchKernelEx: {error.name}")

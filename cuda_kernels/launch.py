"""The launch of a kernel in one shape, of the kind that suits it."""

from __future__ import annotations

from cupy.cuda import driver

from . import early_launch


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
        self._plain = function, *grid, threads, 1, 1, shared_bytes
        self._together = together
        self._early = None
        if early and not together:
            self._early = early_launch.EarlyLaunch(function, grid, threads, shared_bytes)

    def __call__(self, stream: int, arguments: int) -> None:
        """Launch on a stream of the current device. arguments: the address of those of the kernel."""
        if self._early is not None and early_launch.allowed():
            self._early.launch(stream, arguments)
        elif self._together:
            driver.launchCooperativeKernel(*self._plain, stream, arguments)
        else:
            driver.launchKernel(*self._plain, stream, arguments, 0)

"""How decode calls are timed: competitors in turns, and on the CPU by the clock."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from parallax_core.cpu import threads

from .decode_arrays import Framework

# Seconds a call took, one number a turn.
Turn = Callable[[], float]
WARM_UP = 3
LEAST_ROUNDS = 5
# Of calls from Python, of which the least disturbed counts: others on a shared processor slow it for a while.
HOST_PASSES = 5


class Timer(Protocol):
    """Times calls on one device."""

    def calls(self, nbytes: int, caches: int) -> int:
        """How many calls a turn holds, every cache as often as the others. nbytes: that a call reads."""

    def prepare(self, functions: Sequence[Callable[[], object]], calls: int) -> Turn:
        """A turn of ``calls`` calls that go round the functions."""

    def read(self, caches: Sequence[tuple]) -> tuple[Turn, int]:
        """A turn of plain reading, and the bytes that it reads a call."""

    def host(self, function: Callable[[], object]) -> float | None:
        """Seconds from a call to its return, nothing waited for, of a pass; None where a call is its work."""


def timer(arrays: Framework) -> Timer:
    """The timer of a framework's arrays. arrays: the framework, which also says the device."""
    if not arrays.on_gpu:
        return CpuTimer()
    from . import decode_graphs

    return decode_graphs.TorchTimer() if arrays.name == "torch" else decode_graphs.CupyTimer()


def in_turns(competitors: dict[str, Turn], rounds: int, seconds: float) -> dict[str, np.ndarray]:
    """Let competitors take turns, so that a drift of the machine hits all alike.

    competitors: their turns. rounds: how often each has its turn, after one to warm up. seconds: after which
    no round is begun beyond the fifth. Returns the seconds a call, ``(rounds,)`` each.
    """
    for turn in competitors.values():
        turn()
    taken: dict[str, list[float]] = {name: [] for name in competitors}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for name, turn in competitors.items():
            taken[name].append(turn())
    return {name: np.array(times) for name, times in taken.items()}


def least_disturbed(competitors: dict[str, Callable[[], float | None]]) -> dict[str, float | None]:
    """Let competitors make several passes in turns, and give the fastest of each, None where it has none.

    competitors: what makes a pass and returns its seconds a call.
    """
    fastest: dict[str, float | None] = {}
    for _ in range(HOST_PASSES):
        for name, make_pass in competitors.items():
            seconds, before = make_pass(), fastest.get(name)
            fastest[name] = seconds if before is None or seconds is None else min(before, seconds)
    return fastest


def round_calls(
    nbytes: int, caches: int, *, turn: float, floor: float, bandwidth: float, least: int, most: int
) -> int:
    """Calls that fill ``turn`` seconds at ``floor + nbytes / bandwidth`` each, every cache equally often."""
    wanted = min(most, max(least, turn / (floor + nbytes / bandwidth)))
    return caches * math.ceil(wanted / caches)


class CpuTimer:
    """Times calls by the clock."""

    def calls(self, nbytes, caches):
        return round_calls(nbytes, caches, turn=5e-3, floor=2e-5, bandwidth=2e10, least=1, most=100)

    def prepare(self, functions, calls):
        for _ in range(WARM_UP):
            functions[0]()

        def turn() -> float:
            start = time.perf_counter()
            for i in range(calls):
                functions[i % len(functions)]()
            return (time.perf_counter() - start) / calls

        return turn

    def read(self, caches):
        """The same memory on the same number of threads, in stretches of a size that a core's cache holds."""
        flat = [_words(x) for cache in caches for x in cache]
        nbytes = sum(x.nbytes for x in flat)
        # A small cache is read again and again: waking the threads must not count as reading.
        passes = math.ceil(_LEAST_READ / nbytes)
        pieces = [x[i : i + _STRETCH] for x in flat for i in range(0, len(x), _STRETCH)] * passes

        def maxima(_counter, left: collections.deque) -> None:
            while True:
                try:
                    piece = left.popleft()
                except IndexError:
                    return
                piece.max()

        turn = self.prepare([lambda: threads.run(maxima, len(pieces), collections.deque(pieces))], 1)
        return turn, nbytes * passes

    def host(self, function):
        return None


# 1 MiB of uint32
_STRETCH = 1 << 18
_LEAST_READ = 64 << 20


def _words(x) -> np.ndarray:
    """The memory of an array as integers as wide as its size allows."""
    if not isinstance(x, np.ndarray):  # a tensor of PyTorch, whose bfloat16 NumPy does not know
        import torch

        x = x.view(torch.uint8).numpy()
    return x.reshape(-1).view(np.uint32 if x.nbytes % 4 == 0 else np.uint16)

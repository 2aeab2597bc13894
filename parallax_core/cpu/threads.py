"""The threads that the kernels run on.

Numba's own threading layers each fail somewhere: OpenMP loaded before PyTorch slows PyTorch down threefold
and dies after a fork, and workqueue aborts when two Python threads enter it at once. The kernels here
release the GIL and take their work from an atomic counter, so plain Python threads serve: any number of
callers, beside any other library, after a fork too. Results do not depend on the number of threads, since
every piece of work is computed alike whoever takes it.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def _default_threads() -> int:
    for variable in ("PARALLAX_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(variable, "").partition(",")[0].strip()
        if value.isdecimal() and int(value) > 0:
            return int(value)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_lock = threading.Lock()
_threads = _default_threads()
_pool: ThreadPoolExecutor | None = None


def get_num_threads() -> int:
    """Threads a call may use: PARALLAX_NUM_THREADS, else OMP_NUM_THREADS, else the processors allowed."""
    return _threads


def set_num_threads(n: int) -> None:
    """Set the threads a call may use, the calling one included. Raises ValueError unless ``n >= 1``."""
    global _threads, _pool
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}; expected an integer of at least 1")
    with _lock:
        _threads, old, _pool = n, _pool, None
    if old is not None:
        old.shutdown(wait=False)


def run(kernel, pieces: int, *args) -> None:
    """Run ``kernel(counter, *args)`` on the threads until its counter has passed all pieces of work."""
    global _pool
    counter = np.zeros(1, np.int64)
    helpers = []
    with _lock:
        extra = min(_threads, pieces) - 1
        if extra > 0:
            if _pool is None:
                _pool = ThreadPoolExecutor(max(_threads - 1, 1), thread_name_prefix="parallax")
            helpers = [_pool.submit(kernel, counter, *args) for _ in range(extra)]
    try:
        kernel(counter, *args)
    finally:
        # A helper that another call keeps waiting has nothing left to do here.
        running = [h for h in helpers if not h.cancel()]
        errors = [h.exception() for h in running]
    for error in errors:
        if error is not None:
            raise error


def _forget_threads() -> None:
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork; the child starts its own.
    os.register_at_fork(after_in_child=_forget_threads)

"""Whether this machine and its devices can run CUDA kernels, and if not, why."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

MINIMUM_CAPABILITY = (8, 0)


class Device(NamedTuple):
    """What kernels are chosen by."""

    capability: tuple[int, int]
    multiprocessors: int
    cache_bytes: int  # of the second level
    shared_bytes: int  # that a block may have, of shared memory


def availability() -> str | None:
    """None where the CUDA backend can run; otherwise one sentence that says why not and what installs it."""
    if importlib.util.find_spec("cupy") is None:
        return (
            "CuPy is not installed; pip install 'parallax-core[cuda13]' "
            "(or 'parallax-core[cuda12]' for a driver older than 580)"
        )
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return (
            f"CuPy finds no usable NVIDIA driver ({str(error).strip().splitlines()[0]}); install the driver"
        )
    if count == 0:
        return "no NVIDIA GPU is visible (CUDA_VISIBLE_DEVICES may hide it)"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed; pip install 'parallax-core[cuda13]' (or [cuda12])"
    best = max(properties(index).capability for index in range(count))
    if best < MINIMUM_CAPABILITY:
        return f"the newest GPU has compute capability {best[0]}.{best[1]}; at least 8.0 is needed"
    return None


@functools.cache
def properties(index: int) -> Device:
    """What a device of this machine is."""
    import cupy

    found = cupy.cuda.runtime.getDeviceProperties(index)
    capability = found["major"], found["minor"]
    shared_bytes = found["sharedMemPerBlockOptin"]
    return Device(capability, found["multiProcessorCount"], found["l2CacheSize"], shared_bytes)

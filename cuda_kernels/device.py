"""Whether this machine can run CUDA kernels, and if not, why."""

from __future__ import annotations

import importlib.util

MINIMUM_CAPABILITY = (8, 0)


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
    best = max(_capability(cupy, index) for index in range(count))
    if best < MINIMUM_CAPABILITY:
        return f"the newest GPU has compute capability {best[0]}.{best[1]}; at least 8.0 is needed"
    return f"parallax-core {_version()} has no CUDA kernels yet; arrays on a GPU cannot be used"


def _capability(cupy, index: int) -> tuple[int, int]:
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    return properties["major"], properties["minor"]


def _version() -> str:
    from parallax_core._version import __version__

    return __version__

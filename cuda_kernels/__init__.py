"""NVIDIA GPU backend; imported only when an array on a GPU is passed or its availability is asked for.

The entry is :func:`parallax_core.cuda_kernels.calls.attend`, which needs CuPy; :func:`availability` does not.
"""

from .device import availability

__all__ = ["availability"]

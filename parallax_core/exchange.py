"""Arrays of any framework in and out, through DLPack; :mod:`parallax_core.gpu_exchange` does so on a GPU.

The structures are DLPack's own (github.com/dmlc/dlpack, ``dlpack.h``, ABI 1). They are read and written here
by ctypes because no library does what is needed without side effects: NumPy's DLPack has no bfloat16, and
apache-tvm-ffi imports PyTorch wherever that is installed and cannot export memory that it did not allocate.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from .errors import BackendUnavailableError

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
_READ_ONLY = 1

_NUMPY_DTYPES = {
    (_FLOAT, 16): np.dtype(np.float16),
    (_FLOAT, 32): np.dtype(np.float32),
    (_FLOAT, 64): np.dtype(np.float64),
    (_BFLOAT, 16): np.dtype(ml_dtypes.bfloat16),
    (_BOOL, 8): np.dtype(np.bool_),
    **{(_INT, 8 * n): np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{(_UINT, 8 * n): np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
}

_NO_DLPACK = "{name} is a {kind}; expected an array with __dlpack__ (NumPy, PyTorch, JAX, CuPy, ...)"

# XLA takes a CPU buffer without a copy only where it is aligned so.
ALIGNMENT = 64


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# Indexing makes function objects of our own, whose argument types nobody else changes.
_capsule_new = ctypes.pythonapi["PyCapsule_New"]
_capsule_new.restype, _capsule_new.argtypes = (
    ctypes.py_object,
    (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
)
_capsule_valid = ctypes.pythonapi["PyCapsule_IsValid"]
_capsule_valid.restype, _capsule_valid.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
_capsule_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
# In a destructor the capsule has no references left, and making one would destroy it again.
_dying_valid = ctypes.pythonapi["PyCapsule_IsValid"]
_dying_valid.restype, _dying_valid.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_char_p)
_dying_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_dying_pointer.restype, _dying_pointer.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)


class _Borrowed:
    """Foreign memory as NumPy's array interface sees it; keeps its owner alive."""

    __slots__ = ("__array_interface__", "_capsule", "_owner")

    def __init__(self, tensor: _Tensor, itemsize: int, read_only: bool, capsule, owner):
        shape = tuple(tensor.shape[: tensor.ndim])
        strides = tuple(n * itemsize for n in tensor.strides[: tensor.ndim]) if tensor.strides else None
        self._owner, self._capsule = owner, capsule
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": f"|V{itemsize}",
            "strides": strides,
            # An array without elements may have no address, which NumPy would read as a request to allocate.
            "data": ((tensor.data or 0) + tensor.byte_offset, read_only),
        }


def on_gpu(x: Any) -> bool:
    """Whether an array is on an NVIDIA GPU; False for what is no array, which a later check names."""
    if isinstance(x, np.ndarray):
        return False
    on_cuda = getattr(x, "is_cuda", None)  # PyTorch, whose DLPack device costs 1 us
    if isinstance(on_cuda, bool):
        return on_cuda
    if hasattr(x, "__dlpack_device__"):
        try:
            return int(x.__dlpack_device__()[0]) in (CUDA, CUDA_MANAGED)
        except Exception:
            return False
    return hasattr(x, "__cuda_array_interface__")


def device_name(where: tuple[int, int]) -> str:
    """A DLPack device in words."""
    kind = {CPU: "the CPU", CUDA: "CUDA device", CUDA_MANAGED: "managed memory of CUDA device"}.get(where[0])
    if kind is None:
        return f"a device of DLPack type {where[0]}"
    return kind if where[0] == CPU else f"{kind} {where[1]}"


def device(name: str, x: Any) -> tuple[int, int]:
    """The DLPack device ``(type, index)`` of an array; page-locked host memory counts as the CPU.

    Raises TypeError where ``x`` is no array that can be exchanged: no DLPack, a tensor that requires
    gradients or stands for others than its memory holds, a value that is being traced.
    """
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name} is a masked array; its mask would be lost, pass a plain array")
        return CPU, 0
    if getattr(x, "requires_grad", False):
        raise TypeError(
            f"{name} requires gradients, and this call would cut the graph; "
            "use parallax_core.frameworks.torch, or pass a detached tensor"
        )
    _check_memory_says_all(name, x)
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name} is being traced by JAX; use parallax_core.frameworks.jax inside transformations"
        )
    if getattr(x, "is_cpu", False) is True:  # PyTorch, whose DLPack device takes Python of its own
        return CPU, 0
    if hasattr(x, "__dlpack_device__"):
        try:
            kind, index = x.__dlpack_device__()
        except Exception as error:
            raise TypeError(f"{name} cannot be exchanged through DLPack: {_first_line(error)}") from error
        return (CPU, 0) if int(kind) in (CPU, CUDA_HOST) else (int(kind), int(index))
    if hasattr(x, "__cuda_array_interface__"):
        return CUDA, _device_of(x.__cuda_array_interface__["data"][0])
    raise TypeError(_NO_DLPACK.format(name=name, kind=type(x).__name__))


def _check_memory_says_all(name: str, x: Any) -> None:
    """Refuse a PyTorch tensor that is more than its memory holds, which DLPack would pass over in silence."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return
    if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(f"{name} has a tangent of forward-mode differentiation, which would be dropped")
    for bit, resolve in (("is_conj", "resolve_conj"), ("is_neg", "resolve_neg")):
        # A promise to conjugate or negate: the memory holds other numbers.
        if getattr(x, bit)():
            raise TypeError(f"{name} is a lazy view that was never computed; pass {name}.{resolve}()")


@contextmanager
def opened(arrays: dict[str, Any]) -> Iterator[list]:
    """Arrays by name, all on one device, as NumPy arrays over the same memory, or CuPy arrays on a GPU.

    There CuPy computes on the current stream of the first array's framework. Raises TypeError where an array
    cannot be exchanged or is on another device than the first, BackendUnavailableError where CuPy cannot run.
    """
    places = {name: device(name, x) for name, x in arrays.items()}
    first = next(iter(places))
    for name, place in places.items():
        if place != places[first]:
            raise TypeError(
                f"{name} is on {device_name(place)}; expected {device_name(places[first])}, where {first} is"
            )
    kind, index = places[first]
    if kind not in (CUDA, CUDA_MANAGED):
        yield [to_numpy(name, x) for name, x in arrays.items()]
        return
    from . import cuda_kernels

    reason = cuda_kernels.availability()
    if reason is not None:
        raise BackendUnavailableError(f"{first} is on {device_name(places[first])}, and {reason}")
    from . import gpu_exchange

    stream = gpu_exchange.current_stream(arrays[first], index)
    with gpu_exchange.on(index, stream, arrays.values()):
        views = [gpu_exchange.as_cupy(name, x, index, stream) for name, x in arrays.items()]
        yield views
        gpu_exchange.hold(views, stream)


def to_numpy(name: str, x: Any) -> np.ndarray:
    """A CPU array of any framework as a NumPy array over the same memory.

    Raises TypeError where ``x`` is no array, is not on the CPU, or has a dtype that NumPy and ml_dtypes lack.
    """
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative:
            raise TypeError(f"{name} has dtype {x.dtype.str}; expected native byte order")
        return x
    _check_memory_says_all(name, x)
    tensor, read_only, capsule = imported(name, x)
    if tensor.device.type not in (CPU, CUDA_HOST):
        raise TypeError(
            f"{name} is on {device_name((tensor.device.type, tensor.device.id))}; expected the CPU"
        )
    dtype = dtype_of(name, tensor)
    if 0 in tensor.shape[: tensor.ndim]:
        return np.empty(tuple(tensor.shape[: tensor.ndim]), dtype)
    return np.asarray(_Borrowed(tensor, dtype.itemsize, read_only, capsule, x)).view(dtype)


def imported(name: str, x: Any, **handshake: Any) -> tuple[_Tensor, bool, Any]:
    """What an array exports through DLPack, whether it is read-only, and the capsule that owns both.

    handshake: ``stream``, the one on which the memory is to be ready, for an array on a GPU. The capsule is
    left unconsumed: it frees the tensor itself when it goes.
    """
    if not hasattr(x, "__dlpack__"):
        raise TypeError(_NO_DLPACK.format(name=name, kind=type(x).__name__))
    try:
        try:
            capsule = x.__dlpack__(max_version=(1, 1), **handshake)
        except TypeError:  # a producer older than DLPack 1.0 takes no max_version
            capsule = x.__dlpack__(**handshake)
    except Exception as error:
        raise TypeError(f"{name} cannot be exchanged through DLPack: {_first_line(error)}") from error
    if not _capsule_valid(capsule, b"dltensor_versioned"):
        managed = _Managed.from_address(_capsule_pointer(capsule, b"dltensor"))
        return managed.tensor, False, capsule
    managed = _ManagedVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
    if managed.major != 1:
        raise TypeError(f"{name} speaks DLPack {managed.major}.{managed.minor}; expected version 1")
    return managed.tensor, bool(managed.flags & _READ_ONLY), capsule


def is_immutable(x: Any) -> bool:
    """Whether writing to an array would break its framework: JAX shares equal arrays, and does not say so."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.Array)


def dtype_of(name: str, tensor: _Tensor) -> np.dtype:
    """The NumPy dtype of a tensor of DLPack; TypeError where NumPy and ml_dtypes have none."""
    dtype = _NUMPY_DTYPES.get((tensor.dtype.code, tensor.dtype.bits)) if tensor.dtype.lanes == 1 else None
    if dtype is None:
        raise TypeError(
            f"{name} has DLPack dtype (code {tensor.dtype.code}, {tensor.dtype.bits} bits, "
            f"{tensor.dtype.lanes} lanes); expected float64, float32, float16 or bfloat16, or an integer"
        )
    return dtype


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-contiguous NumPy array that every framework can take without a copy."""
    dtype = np.dtype(dtype)
    # A decode call's Python runs from cold caches, right after others streamed: few steps, and simple ones.
    buffer = np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, buffer, -buffer.ctypes.data % ALIGNMENT)


def hand_back(array: np.ndarray, like: Any) -> Any:
    """A NumPy array, or a CuPy array on a GPU, as an array of ``like``'s framework, over the same memory."""
    if not isinstance(array, np.ndarray):
        from . import gpu_exchange

        return gpu_exchange.hand_back(array, like)
    if isinstance(like, np.ndarray):
        return array
    if array.dtype.byteorder not in "=|" or not array.flags.c_contiguous or array.ctypes.data % ALIGNMENT:
        aligned = empty(array.shape, array.dtype)
        aligned[...] = array
        array = aligned
    return from_dlpack(like)(_Export(array))


def from_dlpack(like: Any) -> Callable[[Any], Any]:
    """What makes an array of ``like``'s framework from one with DLPack, over the same memory."""
    if hasattr(like, "__array_namespace__"):
        return like.__array_namespace__().from_dlpack
    module = sys.modules[type(like).__module__.partition(".")[0]]
    try:
        return module.from_dlpack
    except AttributeError as error:
        raise TypeError(
            f"{module.__name__} has no from_dlpack; results cannot be handed back to it"
        ) from error


class _Export:
    """A DLPack producer over a NumPy array of any dtype, bfloat16 included."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        array = self._array
        if array.dtype != ml_dtypes.bfloat16:
            return array.__dlpack__(max_version=max_version) if max_version else array.__dlpack__()
        ndim = array.ndim
        extents = (ctypes.c_int64 * (2 * ndim))(*array.shape, *(s // array.itemsize for s in array.strides))
        first = ctypes.addressof(extents)
        pointer = ctypes.POINTER(ctypes.c_int64)
        managed = _Managed(
            _Tensor(
                array.ctypes.data,
                _Device(CPU, 0),
                ndim,
                _DataType(_BFLOAT, 16, 1),
                ctypes.cast(first, pointer),
                ctypes.cast(first + 8 * ndim, pointer),
                0,
            ),
            None,
            ctypes.cast(_release, ctypes.c_void_p).value,
        )
        address = ctypes.addressof(managed)
        _exported[address] = (array, extents, managed)
        return _capsule_new(address, b"dltensor", ctypes.cast(_release_unused, ctypes.c_void_p).value)


# What consumers hold of our memory, by the address of its descriptor, until they call its deleter.
_exported: dict[int, tuple] = {}


@_DELETER
def _release(address):
    _exported.pop(address, None)


@_DELETER
def _release_unused(capsule):
    """Destructor of a capsule; one that no consumer has taken still has its first name."""
    if _dying_valid(capsule, b"dltensor"):
        _exported.pop(_dying_pointer(capsule, b"dltensor"), None)


# A consumer may let go of its memory after this module is torn down: the callbacks must outlive it.
for _callback in (_release, _release_unused):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_callback))


def _device_of(address: int) -> int:
    """The device of an address in a GPU's memory."""
    try:
        from cupy.cuda import runtime

        return max(0, runtime.pointerGetAttributes(address).device)
    except Exception:  # without CuPy or a driver the call fails soon, and says why
        return 0


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

"""Arrays on NVIDIA GPUs in and out: with :mod:`parallax_core.exchange` all that knows about frameworks.

PyTorch's tensors and CuPy's arrays are read by their attributes: five of them in 3 us, where exporting one
through DLPack costs a tensor of PyTorch 13 to 18 us. Arrays of any other framework, and of two frameworks in
one call, become CuPy arrays over the same memory. Importing this module imports CuPy.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import cupy
import ml_dtypes
import numpy as np
from cupy.cuda import runtime

from . import exchange

ALIGNMENT = 16
"""Bytes of the widest load."""


class Description(NamedTuple):
    """What a call is checked and planned by: shape, strides in elements, NumPy dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)


# From arrays to their addresses where they are like those that it was made for, else None.
Matcher = Callable[[Sequence], list[int] | None]


class Framework(Protocol):
    """What the backend asks of a framework's arrays; a device is its index."""

    def signature(self, arrays: Sequence) -> tuple[list[int], list] | None:
        """Addresses of the arrays, 0 for None, and what a prepared call depends on beside its options.

        The latter is shapes, strides, dtypes, devices and whether an address is a multiple of ALIGNMENT. None
        where an array is not plainly this framework's own.
        """

    def matcher(self, arrays: Sequence) -> Matcher | None:
        """A function that knows arrays of the same signature faster than by it; None where there is none.

        It is called with as many arrays, of the same types, None where these are.
        """

    def describe(self, name: str, x) -> Description: ...

    def allocator(self, q, shape: tuple[int, ...], dtype: np.dtype | None = None) -> Callable[[Any], Any]:
        """A function that takes an array like ``q`` to an uninitialised contiguous one on its device.

        It is called with that device the current one.
        """

    def address(self, x) -> int: ...

    def contiguous(self, x): ...

    def fill(self, x, value: float) -> None: ...

    def assign(self, to, x) -> None: ...

    def read_back(self, x) -> np.ndarray:
        """A copy in NumPy; waits for the device."""

    def current_stream(self, device: int) -> int: ...


class _CuPy:
    def signature(self, arrays):
        pointers, key = [], []
        for x in arrays:
            if x is None:
                pointers.append(0)
                key.append(None)
            elif type(x) is cupy.ndarray:
                memory = x.data
                pointer = memory.ptr
                pointers.append(pointer)
                # A dtype's hash is slow, and an equal dtype another object at worst.
                key += x.shape, x.strides, x.dtype.char, memory.device_id, not pointer % ALIGNMENT
            else:
                return None
        return pointers, key

    def matcher(self, arrays):
        return None

    def describe(self, name, x):
        size = x.dtype.itemsize
        return Description(x.shape, tuple(n // size for n in x.strides), x.dtype)

    def allocator(self, q, shape, dtype=None):
        dtype = q.dtype if dtype is None else dtype
        return lambda like: cupy.empty(shape, dtype)

    def address(self, x):
        return x.data.ptr

    def contiguous(self, x):
        return cupy.ascontiguousarray(x)

    def fill(self, x, value):
        x.fill(value)

    def assign(self, to, x):
        to[...] = x

    def read_back(self, x):
        return x.get()

    def current_stream(self, device):
        return cupy.cuda.get_current_stream(device).ptr


class _Torch:
    def __init__(self):
        import torch

        self._torch = torch
        self._types = {torch.Tensor, torch.nn.Parameter}
        self._dtypes = {
            torch.float64: np.dtype(np.float64),
            torch.float32: np.dtype(np.float32),
            torch.float16: np.dtype(np.float16),
            torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
            torch.bool: np.dtype(np.bool_),
            torch.uint8: np.dtype(np.uint8),
            torch.int8: np.dtype(np.int8),
            torch.int16: np.dtype(np.int16),
            torch.int32: np.dtype(np.int32),
            torch.int64: np.dtype(np.int64),
        }
        self._torch_dtypes = {ours: theirs for theirs, ours in self._dtypes.items()}
        # torch.cuda.current_stream makes an object in 0.8 us first.
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        self.current_stream = raw or (lambda device: torch.cuda.current_stream(device).cuda_stream)
        self._guards = _torch_guards(torch)
        self._empty = functools.cache(functools.partial(_torch_empty, torch))

    def signature(self, arrays):
        types, pointers, key = self._types, [], []
        try:
            for x in arrays:
                if x is None:
                    pointers.append(0)
                    key.append(None)
                elif type(x) in types and not (x.requires_grad or x.is_neg()):
                    pointer = x.data_ptr()
                    pointers.append(pointer)
                    key += x.shape, x.stride(), x.dtype, x.get_device(), not pointer % ALIGNMENT
                else:
                    return None
        except RuntimeError:  # sparse, nested, or wrapped by a transformation: no strides or no memory
            return None
        return pointers, key

    def matcher(self, arrays):
        places = [i for i, x in enumerate(arrays) if x is not None]
        if self._guards is None or any(arrays[i].data_ptr() % ALIGNMENT for i in places):
            return None
        present, count = operator.itemgetter(*places), len(arrays)
        check = self._guards(*present(arrays), dynamic_dims_sizes=None, dynamic_dims_strides=None).check

        def pointers_of(arrays):
            tensors = present(arrays)
            pointers, bits = [0] * count, 0
            try:
                for i, x in zip(places, tensors):
                    if x.is_nested:  # the test would end the process
                        return None
                    pointers[i] = pointer = x.data_ptr()
                    bits |= pointer
            except RuntimeError:  # no memory, as in signature
                return None
            return None if bits % ALIGNMENT or not check(*tensors) else pointers

        return pointers_of

    def describe(self, name, x):
        if x.dtype not in self._dtypes:
            raise TypeError(
                f"{name} has dtype {x.dtype}; expected float32, float16 or bfloat16, or an integer"
            )
        return Description(tuple(x.shape), x.stride(), self._dtypes[x.dtype])

    def allocator(self, q, shape, dtype=None):
        dtype = q.dtype if dtype is None else self._torch_dtypes[dtype]
        empty = self._empty(q.device)
        if empty is None:
            return lambda like: like.new_empty(shape, dtype=dtype)
        strides = _contiguous(shape)
        return lambda like: empty(shape, strides, dtype)

    def address(self, x):
        return x.data_ptr()

    def contiguous(self, x):
        return x.contiguous()

    def fill(self, x, value):
        x.fill_(value)

    def assign(self, to, x):
        to.copy_(x)

    def read_back(self, x):
        return x.cpu().numpy()


def _contiguous(shape: tuple[int, ...], unit: int = 1) -> tuple[int, ...]:
    """The strides of a contiguous array, whose last one is ``unit``."""
    return tuple(unit * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _torch_guards(torch):
    """PyTorch's own test whether tensors are like others in all but their numbers, in a fifth of the time.

    It belongs to its compiler and is no public interface: None where it is missing, or does not tell apart
    what it must.
    """
    x = torch.zeros(2, 3)
    others = [
        x.t(), x[:, :2], x.expand(1, 2, 3), torch.zeros(3, 2).t(), x.double(), x.clone().requires_grad_(),
        torch.nn.Parameter(x, requires_grad=False), torch.view_as_complex(torch.zeros(2, 3, 2)).conj().imag,
        x.to_sparse(), x.to("meta"),
    ]  # fmt: skip
    try:
        guards = torch._C._dynamo.guards.TensorGuards
        check = guards(x, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return guards if check(x.clone()) and not any(map(check, others)) else None
    except Exception:
        return None


def _torch_empty(torch, device):
    """PyTorch's own way to an uninitialised tensor on the current device, in half the time of the public one.

    It belongs to its compiler too: None where it is missing, or does not give what it must on ``device``.
    """
    try:
        empty = torch._C._dynamo.guards._empty_strided_cuda
        with torch.cuda.device(device):
            x = empty((2, 3), (3, 1), torch.bfloat16)
        found = tuple(x.shape), x.stride(), x.dtype, x.device
        return empty if found == ((2, 3), (3, 1), torch.bfloat16, device) else None
    except Exception:
        return None


CUPY: Framework = _CuPy()
_frameworks: dict[type, Framework] = {cupy.ndarray: CUPY}


def framework(x: Any) -> Framework | None:
    """How arrays of ``x``'s very type are read, None where only an exchange protocol tells."""
    found = _frameworks.get(type(x))
    if found is None:
        torch = sys.modules.get("torch")
        if torch is not None and type(x) in (torch.Tensor, torch.nn.Parameter):
            found = _Torch()
            _frameworks.update({torch.Tensor: found, torch.nn.Parameter: found})
    return found


def current_stream(like: Any, device: int) -> int:
    """The current stream of ``like``'s framework on a device; CuPy's where a framework has none to tell."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.cuda.current_stream(device).cuda_stream
    return cupy.cuda.get_current_stream(device).ptr


def as_cupy(name: str, x: Any, device: int, stream: int) -> cupy.ndarray:
    """An array of any framework on a GPU as a CuPy array over the same memory, ready on a stream."""
    if type(x) is cupy.ndarray:
        return x
    if hasattr(x, "__dlpack__"):
        # 0 would mean "no handshake" to some producers: the legacy default stream is number 1 there.
        tensor, read_only, capsule = exchange.imported(name, x, stream=stream or 1)
        dtype = exchange.dtype_of(name, tensor)
        shape = tuple(tensor.shape[: tensor.ndim])
        strides = tuple(n * dtype.itemsize for n in tensor.strides[: tensor.ndim]) if tensor.strides else None
        address, owner = (tensor.data or 0) + tensor.byte_offset, (x, capsule)
    else:
        interface = x.__cuda_array_interface__
        address, read_only = interface["data"]
        shape, strides, dtype = interface["shape"], interface.get("strides"), np.dtype(interface["typestr"])
        owner = x
        if interface.get("stream") is not None:
            _wait(stream, interface["stream"])
    if name == "out" and (read_only or exchange.is_immutable(x)):
        raise ValueError("out is read-only; expected an array that can be written to")
    if strides is None:
        strides = _contiguous(shape, dtype.itemsize)
    extent = sum((n - 1) * abs(s) for n, s in zip(shape, strides)) + dtype.itemsize if 0 not in shape else 0
    memory = cupy.cuda.UnownedMemory(address, extent, owner, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def hand_back(array: cupy.ndarray, like: Any) -> Any:
    """A CuPy array as an array of ``like``'s framework, over the same memory."""
    if isinstance(like, cupy.ndarray):
        return array
    if type(like).__module__.partition(".")[0] in ("numba", "numba_cuda"):
        return sys.modules["numba"].cuda.as_cuda_array(array)
    return exchange.from_dlpack(like)(array)


class _ForeignStream:
    """A stream by its address, as CuPy asks others for theirs."""

    def __init__(self, address: int):
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def stream_at(address: int) -> cupy.cuda.Stream:
    """The stream at an address, which lives as long as whose it is lets it: CuPy does not destroy it."""
    return cupy.cuda.Stream.from_external(_ForeignStream(address))


@contextmanager
def on(device: int, stream: int, arrays: Iterable):
    """A device and one of its streams as CuPy's current ones; what is CuPy's of the arrays is ready there."""
    if any(isinstance(x, cupy.ndarray) for x in arrays):
        _wait(stream, cupy.cuda.get_current_stream(device).ptr)
    with cupy.cuda.Device(device), stream_at(stream):
        yield


def hold(owners: Any, stream: int) -> None:
    """Keep arrays alive until what is queued on a stream is done.

    A framework that does not know the stream would give their memory to others as soon as they are dropped.
    During the capture of a graph nothing is held: its arrays must outlive it anyway.
    """
    with _lock:
        while _held and _held[0][0].done:
            _held.popleft()
        if not runtime.streamIsCapturing(stream):
            event = cupy.cuda.Event(disable_timing=True)
            event.record(stream_at(stream))
            _held.append((event, owners))


_lock = threading.Lock()
_held: deque[tuple[cupy.cuda.Event, Any]] = deque()


def _wait(stream: int, producer: int) -> None:
    if producer != stream:
        event = cupy.cuda.Event(disable_timing=True)
        event.record(stream_at(producer))
        stream_at(stream).wait_event(event)

"""A GPU that is none: its arrays lie in host memory, and what would run on it is for a test to say."""

from contextlib import contextmanager

import numpy as np
import pytest

from parallax_core import attention, cuda_kernels, exchange, gpu_exchange
from parallax_core.cuda_kernels import calls, device
from parallax_core.gpu_exchange import ALIGNMENT, Description


class Array:
    """An array on a GPU that is none."""

    def __init__(self, data, device=0):
        self.data, self.device = np.asarray(data), device

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)

    def reshape(self, *shape):
        return Array(self.data.reshape(*shape), self.device)

    def swapaxes(self, a, b):
        return Array(self.data.swapaxes(a, b), self.device)

    def __getitem__(self, index):
        return Array(self.data[index], self.device)

    def __dlpack_device__(self):
        return exchange.CUDA, self.device

    def __dlpack__(self, **_):
        raise RuntimeError("a copy of an array of the stand-in")


class Framework:
    """The stand-in's side of the exchange; ``memory`` is what its device has left."""

    memory = 2**40

    def signature(self, arrays):
        pointers, key = [], []
        for x in arrays:
            if x is None:
                pointers.append(0)
                key.append(None)
            elif isinstance(x, Array):
                pointers.append(self.address(x))
                data = x.data
                key += data.shape, data.strides, data.dtype, x.device, not pointers[-1] % ALIGNMENT
            else:
                return None
        return pointers, key

    def matcher(self, arrays):
        return None

    def describe(self, name, x):
        size = x.data.itemsize
        return Description(x.data.shape, tuple(s // size for s in x.data.strides), x.data.dtype)

    def allocator(self, q, shape, dtype=None):
        def allocate(like):
            if np.prod(shape) > self.memory:
                raise MemoryError("nothing left")
            return Array(np.full(shape, 77, like.dtype if dtype is None else dtype), like.device)

        return allocate

    def address(self, x):
        return x.data.__array_interface__["data"][0]

    def contiguous(self, x):
        return Array(np.ascontiguousarray(x.data), x.device)

    def fill(self, x, value):
        x.data.fill(value)

    def assign(self, to, x):
        to.data[...] = x.data

    def read_back(self, x):
        return x.data.copy()

    def current_stream(self, device):
        return 1234 + device


class Runtime:
    current = 0

    @classmethod
    def getDevice(cls):
        return cls.current

    @classmethod
    def setDevice(cls, index):
        cls.current = index


@contextmanager
def stand_in(capability=(9, 0), multiprocessors=132):
    """The stand-in in place of a GPU: devices 0 and 1 are of that capability, and device 2 is too old.

    Gives what further patches go through.
    """
    shared_bytes = (227 if capability[0] in (9, 10) else 99) << 10
    own = device.Device(capability, multiprocessors, 50 << 20, shared_bytes)
    old = device.Device((7, 5), 72, 4 << 20, 64 << 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_exchange._frameworks, Array, Framework())
        patch.setattr(calls, "runtime", Runtime)
        patch.setattr(device, "properties", lambda n: old if n == 2 else own)
        patch.setattr(cuda_kernels, "availability", lambda: None)
        patch.setattr(attention, "_gpu_calls", None)
        calls.forget()
        yield patch
        calls.forget()


def on_gpu(case):
    """A case with its arrays as the stand-in's, where every one was NumPy's."""
    options = {n: Array(x) if isinstance(x, np.ndarray) else x for n, x in case.options.items()}
    q, r, k, v = map(Array, (case.q, case.r, *case.keys_and_values))
    return type(case)(q, r, k, v, options)

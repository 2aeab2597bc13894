"""The arrays of a decode point, in the framework that its device and its peers need."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np

from .decode_point import DecodePoint
from .problems import seed_sequence


class Framework(Protocol):
    """Where arrays are made. name: of the framework. device: the part of the machine that holds them."""

    name: str
    device: str
    on_gpu: bool

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        """Independent standard normal numbers."""

    def copy(self, x: Any) -> Any:
        """The same numbers in other memory."""

    def index(self, x: np.ndarray) -> Any:
        """A NumPy array of int32 on the device."""

    def float64(self, x: Any) -> np.ndarray:
        """An array as float64 on the host."""

    def release(self) -> None:
        """Give memory that is held for reuse back to the device."""


class TorchArrays:
    """PyTorch tensors on the CPU or on the current GPU."""

    name = "torch"

    def __init__(self, kind: Literal["gpu", "cpu"]):
        import torch

        self.on_gpu = kind == "gpu"
        self._torch, self._where = torch, "cuda" if self.on_gpu else "cpu"
        self.device = torch.cuda.get_device_name() if self.on_gpu else processor()

    def normal(self, shape, dtype, seed):
        generator = self._torch.Generator(self._where).manual_seed(seed)
        return self._torch.randn(
            shape, generator=generator, device=self._where, dtype=getattr(self._torch, dtype)
        )

    def copy(self, x):
        return x.clone()

    def index(self, x):
        return self._torch.from_numpy(x.astype(np.int32)).to(self._where)

    def float64(self, x):
        return x.double().cpu().numpy()

    def release(self):
        if self.on_gpu:
            self._torch.cuda.empty_cache()


class CupyArrays:
    """CuPy arrays on the current GPU."""

    name, on_gpu = "cupy", True

    def __init__(self):
        import cupy

        self._cupy = cupy
        self.device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()

    def normal(self, shape, dtype, seed):
        drawn = self._cupy.random.RandomState(seed).standard_normal(shape, dtype=np.float32)
        return drawn.astype(_numpy_dtype(dtype))

    def copy(self, x):
        return x.copy()

    def index(self, x):
        return self._cupy.asarray(x, dtype=np.int32)

    def float64(self, x):
        return x.astype(np.float64).get()

    def release(self):
        self._cupy.get_default_memory_pool().free_all_blocks()


class NumpyArrays:
    """NumPy arrays."""

    name, on_gpu = "numpy", False

    def __init__(self):
        self.device = processor()

    def normal(self, shape, dtype, seed):
        drawn = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        return drawn.astype(_numpy_dtype(dtype))

    def copy(self, x):
        return x.copy()

    def index(self, x):
        return x.astype(np.int32)

    def float64(self, x):
        return x.astype(np.float64)

    def release(self):
        pass


def framework(device: Literal["gpu", "cpu"]) -> Framework:
    """The framework of a device's arrays: PyTorch where it can be imported, since peers need it.

    Raises RuntimeError where a GPU is asked for and none can be used.
    """
    if importlib.util.find_spec("torch") is not None:
        import torch

        if device == "cpu" or torch.cuda.is_available():
            return TorchArrays(device)
    if device == "cpu":
        return NumpyArrays()
    if importlib.util.find_spec("cupy") is None:
        raise RuntimeError("device: a GPU needs CuPy or PyTorch with CUDA, and neither is here")
    return CupyArrays()


@dataclass(frozen=True)
class DecodeProblem:
    """The arrays of a point.

    q, r: ``(B, 1, Hq, D)``. caches: pairs ``k, v``, each ``(B, L, Hkv, D)`` or, in pages,
    ``(num_pages, page_size, Hkv, D)``, of the same numbers in different memory; one pair where the cache is
    warm. page_table: ``(B, pages)``, and lengths: ``(B,)``, or both None. framework: that they are from.
    ridge: of LLA.
    """

    q: Any
    r: Any
    caches: list[tuple[Any, Any]]
    page_table: Any
    lengths: Any
    framework: Framework
    ridge: float

    @property
    def paged(self) -> dict[str, Any]:
        """What our own calls are given beside keys and values in pages."""
        if self.page_table is None:
            return {}
        return {"page_table": self.page_table, "cache_seqlens": self.lengths}


def build(point: DecodePoint, arrays: Framework, rotation: int) -> DecodeProblem:
    """Draw the arrays of a point.

    point: what is measured. arrays: where they are made. rotation: bytes of all the pairs of a cold cache.
    Returns a DecodeProblem; pages lie in random order.
    """
    B, Hq, Hkv, L, D = point.shape
    stream = seed_sequence(point.seed, "decode", *point.shape, point.dtype, point.page_size)
    seeds = [int(seed) for seed in stream.generate_state(4)]
    stored, page_table, lengths = (B, L), None, None
    if point.page_size is not None:
        pages = -(-L // point.page_size)
        stored = (B * pages, point.page_size)
        order = np.random.default_rng(stream).permutation(B * pages)
        page_table, lengths = arrays.index(order.reshape(B, pages)), arrays.index(np.full(B, L))
    q, r = (arrays.normal((B, 1, Hq, D), point.dtype, seed) for seed in seeds[:2])
    k, v = (arrays.normal((*stored, Hkv, D), point.dtype, seed) for seed in seeds[2:])
    count = 1 if point.cache == "warm" else max(1, -(-rotation // point.cache_bytes))
    caches = [(k, v), *((arrays.copy(k), arrays.copy(v)) for _ in range(count - 1))]
    return DecodeProblem(q, r, caches, page_table, lengths, arrays, point.ridge)


def processor() -> str:
    """The name of the CPU."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)

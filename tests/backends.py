"""Every backend behind one way to call it, for tests that hold all of them to the same properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from strategies import DTYPES, FLOAT64

import parallax_core as plx


def _as_it_is(x):
    return x


@dataclass(frozen=True)
class Backend:
    """A module with the public signatures, the dtypes it takes, and the way in and out of its arrays.

    put: makes an array of the backend's device of a NumPy array; get: the way back. wide: whether it computes
    in float64 and returns it, whatever the dtype of its inputs.
    """

    name: str
    module: ModuleType
    dtypes: tuple[np.dtype, ...] = DTYPES
    put: Callable[[np.ndarray], Any] = _as_it_is
    get: Callable[[Any], np.ndarray] = _as_it_is
    wide: bool = False

    def __call__(self, function: str, *arrays, **options):
        """``module.function`` on NumPy arrays; its results, states among them, as NumPy arrays."""
        options = {n: self.put(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
        result = getattr(self.module, function)(*map(self.put, arrays), **options)
        return self._fetched(result)

    def _fetched(self, result):
        if isinstance(result, tuple):
            parts = [self._fetched(x) for x in result]
            return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
        return self.get(result)

    def compute_dtype(self, dtype) -> np.dtype:
        return FLOAT64[0] if self.wide or dtype == np.float64 else np.dtype(np.float32)

    def result_dtype(self, dtype) -> np.dtype:
        return FLOAT64[0] if self.wide else np.dtype(dtype)


REFERENCE = Backend("reference", plx.reference, wide=True)
CPU = Backend("cpu", plx)
BACKENDS = (REFERENCE, CPU)

every_backend_and_dtype = pytest.mark.parametrize(
    "backend, dtype",
    [pytest.param(b, dtype, id=f"{b.name}-{dtype.name}") for b in BACKENDS for dtype in b.dtypes],
)

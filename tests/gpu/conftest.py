"""Tests that need an NVIDIA GPU; everywhere else each is skipped with the backend's own reason.

With ``PARALLAX_EMULATE=1`` in the environment they run without one, the kernels compiled for the host: all
but those of streams, graphs and the frameworks themselves, and many times slower.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from parallax_core import cuda_kernels

# JAX would take three quarters of the memory that PyTorch and CuPy share with it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

HERE = Path(__file__).parent
UNAVAILABLE = cuda_kernels.availability()
EMULATED = UNAVAILABLE is not None and os.environ.get("PARALLAX_EMULATE") == "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if UNAVAILABLE is not None and not EMULATED:
                item.add_marker(pytest.mark.skip(reason=UNAVAILABLE))


@pytest.fixture(autouse=True, scope="session")
def checked_kernels():
    """Kernels that compute-sanitizer's racecheck can follow, with ``PARALLAX_RACECHECK=1``."""
    if os.environ.get("PARALLAX_RACECHECK") != "1":
        yield
        return
    from compile_options import add_options

    with pytest.MonkeyPatch.context() as patch:
        add_options(patch, "-DFOR_RACECHECK", "--generate-line-info")
        yield


class Framework:
    """One way to put NumPy arrays on the GPU, strides and all, and to get results back."""

    def put(self, x: np.ndarray):
        if x.ndim and x.shape[-1] > 1 and x.strides[-1] == 2 * x.itemsize:
            return self.put(np.repeat(x, 2, axis=-1))[..., ::2]
        order = np.argsort([-s for s in x.strides], kind="stable")
        return self.transposed(self.asarray(np.ascontiguousarray(x.transpose(order))), np.argsort(order))

    def case(self, case):
        """A case of ``strategies`` with all of its arrays on the GPU."""
        options = {n: self.put(x) if isinstance(x, np.ndarray) else x for n, x in case.options.items()}
        arrays = (self.put(x) for x in (case.q, case.r, *case.keys_and_values))
        return type(case)(*arrays, options)

    def state(self, state):
        """A state whose methods can be called."""
        return state

    def disturbances(self):
        """So many runs, whose waits the clock makes different."""
        return range(20)


class CuPy(Framework):
    name = "cupy"

    def __init__(self):
        self.module = pytest.importorskip("cupy")

    def asarray(self, x):
        if x.dtype.name == "bfloat16":
            return self.module.asarray(x.view(np.uint16)).view(x.dtype)
        return self.module.asarray(x)

    def transposed(self, x, order):
        return x.transpose(*map(int, order)) if x.ndim else x

    def get(self, x) -> np.ndarray:
        return x.get()


class Torch(Framework):
    name = "torch"

    def __init__(self):
        self.module = pytest.importorskip("torch")
        if not self.module.cuda.is_available():
            pytest.skip("this PyTorch has no CUDA")

    def asarray(self, x):
        if x.dtype.name == "bfloat16":
            return self.module.from_numpy(x.view(np.int16).copy()).cuda().view(self.module.bfloat16)
        return self.module.from_numpy(x.copy()).cuda()

    def transposed(self, x, order):
        return x.permute(*map(int, order)) if x.ndim else x

    def get(self, x) -> np.ndarray:
        if x.dtype == self.module.bfloat16:
            x = x.float()
        return x.cpu().numpy()


class Jax(Framework):
    name = "jax"

    def __init__(self):
        self.module = pytest.importorskip("jax")
        if self.module.default_backend() != "gpu":
            pytest.skip("this JAX has no CUDA")
        # Lengths may be int64.
        self.module.config.update("jax_enable_x64", True)

    def asarray(self, x):
        return self.module.numpy.asarray(x)

    def transposed(self, x, order):
        return x.transpose(*map(int, order)) if x.ndim else x

    def get(self, x) -> np.ndarray:
        return np.asarray(x)


class Emulated(Framework):
    name = "emulated"

    def __init__(self):
        from stand_in import Array

        self.array = Array

    @property
    def module(self):
        pytest.skip("needs a framework with CUDA")

    def put(self, x):
        return self.array(x.copy() if 0 in x.shape or not x.flags.writeable else x)

    def get(self, x):
        x = getattr(x, "data", x) if isinstance(x, self.array) else np.asarray(x)
        return x.astype(np.float32) if x.dtype.name == "bfloat16" else x.copy()

    def state(self, state):
        return type(state)(*(x.data if isinstance(x, self.array) else x for x in state))

    def disturbances(self):
        from emulation import EARLY, LATE, RANDOM_EARLY, RANDOM_LATE, Prepared

        try:
            for Prepared.order in (EARLY, RANDOM_LATE, RANDOM_EARLY):
                yield Prepared.order
        finally:
            Prepared.order = LATE


def _kinds(*kinds):
    return [Emulated] if EMULATED else list(kinds)


@pytest.fixture(scope="session", autouse=EMULATED)
def _emulation():
    from emulation import emulated

    with emulated():
        yield


@pytest.fixture(scope="session", params=_kinds(CuPy, Torch, Jax), ids=lambda kind: kind.name)
def framework(request):
    return request.param()


@pytest.fixture(scope="session", params=_kinds(CuPy, Torch), ids=lambda kind: kind.name)
def writable(request):
    """A framework whose arrays can be written to."""
    return request.param()


@pytest.fixture(scope="session")
def cuda_torch():
    return _kinds(Torch)[0]()


@pytest.fixture(scope="session")
def cuda_cupy():
    return _kinds(CuPy)[0]()

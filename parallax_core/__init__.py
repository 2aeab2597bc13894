"""Attention as regression at test time: softmax, local linear and Parallax attention on any array."""

from typing import Any

from . import _checkout
from ._version import __version__
from .attention import (
    lla_attention,
    lla_attention_backward,
    lla_decode,
    lla_probe,
    local_attention,
    parallax_attention,
    parallax_attention_backward,
    parallax_decode,
    softmax_attention,
    softmax_attention_backward,
    softmax_decode,
)
from .compare import compare
from .errors import BackendUnavailableError, SolverError
from .probes import fit_probe
from .state import LLAState, ParallaxState, SoftmaxState, merge_states

_checkout.map_folders()

__all__ = [
    "BackendUnavailableError",
    "LLAState",
    "ParallaxState",
    "SoftmaxState",
    "SolverError",
    "__version__",
    "compare",
    "fit_probe",
    "lla_attention",
    "lla_attention_backward",
    "lla_decode",
    "lla_probe",
    "local_attention",
    "merge_states",
    "parallax_attention",
    "parallax_attention_backward",
    "parallax_decode",
    "reference",
    "softmax_attention",
    "softmax_attention_backward",
    "softmax_decode",
]


def __getattr__(name: str) -> Any:
    if name == "reference":  # brings SciPy's solvers, which an import of the package should not wait for
        import importlib

        return importlib.import_module(".reference", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Float64 NumPy and SciPy estimators: readable, untiled, and the yardstick of the fast paths."""

from ..state import merge_states
from .family import local_attention
from .global_estimators import global_ridge_attention, linear_attention
from .gradients import lla_attention_backward, parallax_attention_backward, softmax_attention_backward
from .lla import lla_attention, lla_decode, lla_probe
from .parallax import parallax_attention, parallax_decode
from .softmax import softmax_attention, softmax_decode

__all__ = [
    "global_ridge_attention",
    "linear_attention",
    "lla_attention",
    "lla_attention_backward",
    "lla_decode",
    "lla_probe",
    "local_attention",
    "merge_states",
    "parallax_attention",
    "parallax_attention_backward",
    "parallax_decode",
    "softmax_attention",
    "softmax_attention_backward",
    "softmax_decode",
]

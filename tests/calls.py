"""One way to call every operation of a module with the reference's signatures on a case of ``strategies``."""

from __future__ import annotations

from strategies import AttentionCase


def call(module, operation: str, case, **extra):
    """``module.<operation>_attention`` or ``_decode`` on a case; operation: softmax, parallax or lla."""
    kind = "attention" if isinstance(case, AttentionCase) else "decode"
    function = getattr(module, f"{operation}_{kind}")
    queries = (case.q, case.r) if operation == "parallax" else (case.q,)
    return function(*queries, *case.keys_and_values, **case.options, **extra)

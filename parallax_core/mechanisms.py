"""The named mechanisms as points of one family: bandwidth, probe, affine structure."""

from __future__ import annotations

from types import ModuleType

# Each entry is a row of the table in docs/math.md, "The family"; what it leaves out is the caller's.
MECHANISMS: dict[str, dict[str, object]] = {
    "softmax": {"probe": None},
    "lla": {"probe": "solve"},
    "parallax": {},
    "global-ridge": {"probe": "solve", "scale": 0.0, "intercept": False},
    "linear-attention": {"probe": "query", "scale": 0.0, "intercept": False},
}


def apply_mechanism(name, q, k, v, *, ridge=None, probe=None, backend: ModuleType | None = None, **options):
    """Evaluate a named mechanism on queries, keys and values.

    name: a key of ``MECHANISMS``. q, k, v: as in ``local_attention``. ridge: for the solved probes, in
    squared key units; 0 means the minimum-norm solution. probe: ``(B, Lq, Hq, D)``, for ``parallax``.
    backend: a module with ``local_attention``, ``parallax_core`` unless given. options: ``scale`` or
    ``bandwidth``, ``kernel`` and the masks of ``local_attention``; the global mechanisms have scale 0 and
    ignore the first three.
    Returns ``(B, Lq, Hq, Dv)``. Raises ValueError for an unknown name or a probe that is missing.
    Source: docs/math.md, "The family".
    """
    if name not in MECHANISMS:
        raise ValueError(f"name: expected one of {', '.join(MECHANISMS)}, got {name!r}")
    if name == "parallax" and probe is None:
        raise ValueError("probe: the mechanism 'parallax' needs an array of shape (B, Lq, Hq, D), got None")
    if backend is None:
        import parallax_core as backend
    family = MECHANISMS[name]
    if "scale" in family:
        options = {
            key: value for key, value in options.items() if key not in ("scale", "bandwidth", "kernel")
        }
    if family.get("probe") == "solve":
        options |= {"ridge": ridge, "solver": "lstsq" if ridge == 0 else "cholesky"}
    if name == "parallax":
        options |= {"probe": probe}
    return backend.local_attention(q, k, v, **family, **options)

"""Fitting a learned probe ``r = W_R x`` by least squares."""

from __future__ import annotations

from types import ModuleType

import numpy as np


def covariances(q, k, v, *, backend: ModuleType | None = None, **options) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and covariance of values with keys, as one softmax attention over their products.

    q: ``(B, Lq, Hq, D)``. k: ``(B, Lk, Hkv, D)``. v: ``(B, Lk, Hkv, Dv)``. backend: a module with
    ``local_attention``, ``parallax_core.reference`` unless given. options: as of ``local_attention``.
    Returns ``vbar`` ``(B, Lq, Hq, Dv)`` and ``C_vk`` ``(B, Lq, Hq, Dv, D)``, float64.
    Source: docs/math.md, "Attention as regression at test time".
    """
    if backend is None:
        from parallax_core import reference as backend
    q, k, v = (np.asarray(array, dtype=np.float64) for array in (q, k, v))
    D, Dv = k.shape[-1], v.shape[-1]
    # About the mean key: raw products of keys with a common offset would cancel.
    centred = k - k.mean(1, keepdims=True)
    products = (v[..., :, None] * centred[..., None, :]).reshape(*v.shape[:3], Dv * D)
    means = backend.local_attention(q, k, np.concatenate([v, centred, products], -1), probe=None, **options)
    vbar, kbar, second = np.split(means, [Dv, Dv + D], axis=-1)
    return vbar, second.reshape(*vbar.shape, D) - vbar[..., :, None] * kbar[..., None, :]


def fit_probe(
    x, q, k, v, target, *, ridge: float, backend: ModuleType | None = None, **options
) -> np.ndarray:
    """Fit the ``W_R`` of ``r = W_R x`` that makes Parallax predict a target, one matrix a head.

    The output ``vbar - C_vk W_R x`` is linear in ``W_R``, so this is one ridge regression a head:
    the mean over rows of ``|target - vbar + C_vk W_R x|^2`` plus ``ridge |W_R|^2`` is minimised.

    x: ``(B, Lq, Hq, Dx)``, what the probe is computed from. q: ``(B, Lq, Hq, D)``. k: ``(B, Lk, Hkv, D)``.
    v: ``(B, Lk, Hkv, Dv)``. target: ``(B, Lq, Hq, Dv)``. ridge: a positive number, in squared units of the
    target. backend, options: as of ``covariances``; the masks, ``scale`` and ``kernel`` must be those that
    the probe will be used with.
    Returns ``W_R`` ``(Hq, D, Dx)``, float64.
    Raises ValueError for shapes that do not fit, a ridge that is not positive, or numbers that are not
    finite.
    Source: arXiv 2605.29157; docs/math.md.
    """
    arrays = {"x": x, "q": q, "k": k, "v": v, "target": target}
    arrays = {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}
    _validate(arrays, ridge)
    x, q, k, v, target = arrays.values()
    vbar, C_vk = covariances(q, k, v, backend=backend, **options)
    rows = x.shape[0] * x.shape[1]
    return np.stack(
        [
            _fit_head(
                x[:, :, head].reshape(rows, -1),
                C_vk[:, :, head].reshape(rows, *C_vk.shape[3:]),
                (vbar - target)[:, :, head].reshape(rows, -1),
                ridge,
            )
            for head in range(x.shape[2])
        ]
    )


def _fit_head(x: np.ndarray, C_vk: np.ndarray, residual: np.ndarray, ridge: float) -> np.ndarray:
    # The normal matrix is a sum of Kronecker products (C'C) x (x x'): one product of (D*D, rows) and
    # (rows, Dx*Dx) matrices, which never forms the (rows*Dv, D*Dx) design.
    import scipy.linalg  # not at the top: an import of the package should not wait for it

    rows, D, Dx = len(x), C_vk.shape[2], x.shape[1]
    CtC = np.matmul(C_vk.swapaxes(1, 2), C_vk).reshape(rows, D * D)
    xxt = (x[:, :, None] * x[:, None, :]).reshape(rows, Dx * Dx)
    gram = (CtC.T @ xxt).reshape(D, D, Dx, Dx).swapaxes(1, 2).reshape(D * Dx, D * Dx) / rows
    moment = np.einsum("nec,ne->nc", C_vk, residual).T @ x / rows
    gram[np.diag_indices_from(gram)] += ridge
    return scipy.linalg.solve(gram, moment.ravel(), assume_a="pos", overwrite_a=True).reshape(D, Dx)


def _validate(arrays: dict[str, np.ndarray], ridge: float) -> None:
    for name, array in arrays.items():
        if array.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes (B, L, H, D), got shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or Inf")
    q, v = arrays["q"], arrays["v"]
    if arrays["x"].shape[:3] != q.shape[:3]:
        raise ValueError(f"x: expected shape {(*q.shape[:3], 'Dx')} to match q, got {arrays['x'].shape}")
    if arrays["target"].shape != (*q.shape[:3], v.shape[3]):
        raise ValueError(
            f"target: expected shape {(*q.shape[:3], v.shape[3])} to match q and v, "
            f"got {arrays['target'].shape}"
        )
    if 0 in q.shape:
        raise ValueError(f"q: expected at least one row to fit on, got shape {q.shape}")
    if not (np.isscalar(ridge) and np.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge: expected a positive finite number, got {ridge!r}")

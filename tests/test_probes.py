"""The fitted probe is the least-squares one."""

import numpy as np
import pytest

import parallax_core
from parallax_core.probes import covariances, fit_probe


def arrays(seed=0, B=2, Lq=20, Lk=24, Hq=2, Hkv=1, D=3, Dv=2, Dx=4):
    rng = np.random.default_rng(seed)
    shapes = {"x": (B, Lq, Hq, Dx), "q": (B, Lq, Hq, D), "k": (B, Lk, Hkv, D), "v": (B, Lk, Hkv, Dv)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def output(W_R, x, q, k, v, **options):
    return parallax_core.reference.parallax_attention(q, np.einsum("hdx,blhx->blhd", W_R, x), k, v, **options)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window_size": 9, "scale": 0.4}])
def test_the_matrix_that_made_a_target_is_recovered(options):
    given = arrays()
    W_R = np.random.default_rng(1).standard_normal((2, 3, 4))
    target = output(W_R, **given, **options)
    fitted = fit_probe(**given, target=target, ridge=1e-13, **options)
    # The ridge biases by ridge / least eigenvalue of the normal matrix, which is about 1e-4 here.
    np.testing.assert_allclose(fitted, W_R, atol=1e-7)


def test_the_fit_minimises_the_ridge_objective():
    given = arrays()
    target = np.random.default_rng(2).standard_normal((2, 20, 2, 2))
    ridge = 0.03

    def objective(W_R):
        rows = 2 * 20
        error = np.square(output(W_R, **given) - target).sum((0, 1, 3)) / rows
        return error + ridge * np.square(W_R).sum((1, 2))

    W_R = fit_probe(**given, target=target, ridge=ridge)
    rng = np.random.default_rng(3)
    for _ in range(20):
        step = 1e-4 * rng.standard_normal(W_R.shape)
        # A quadratic at its minimum: the same rise on both sides, up to rounding of the objective.
        ahead, behind = (objective(W_R + sign * step) - objective(W_R) for sign in (1, -1))
        assert (ahead > 0).all()
        np.testing.assert_allclose(ahead, behind, rtol=1e-4)


def test_a_large_ridge_leaves_softmax():
    given = arrays()
    W_R = fit_probe(**given, target=np.ones((2, 20, 2, 2)), ridge=1e12)
    assert np.abs(W_R).max() < 1e-11


def test_covariances_do_not_change_with_an_offset_of_the_keys():
    given = arrays()
    # With the Gaussian kernel the queries move along; the offset costs float64 about 1e3 of its 1e-16.
    shift = 1e3
    q, k, v = given["q"], given["k"], given["v"]
    options = {"kernel": "gaussian", "scale": 1.0, "causal": False}
    vbar, C_vk = covariances(q, k, v, **options)
    moved_vbar, moved_C_vk = covariances(q + shift, k + shift, v, **options)
    np.testing.assert_allclose(moved_vbar, vbar, atol=1e-11)
    np.testing.assert_allclose(moved_C_vk, C_vk, atol=1e-11)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": np.ones((2, 20, 2))}, "x: expected 4 axes"),
        ({"x": np.ones((2, 19, 2, 4))}, r"x: expected shape \(2, 20, 2, 'Dx'\)"),
        ({"target": np.ones((2, 20, 2, 3))}, r"target: expected shape \(2, 20, 2, 2\)"),
        ({"target": np.full((2, 20, 2, 2), np.nan)}, "target: expected finite"),
        ({"ridge": 0.0}, "ridge: expected a positive finite number, got 0.0"),
        ({"ridge": np.inf}, "ridge: expected a positive finite number, got inf"),
    ],
)
def test_bad_input_is_named(change, message):
    call = arrays() | {"target": np.ones((2, 20, 2, 2)), "ridge": 0.1} | change
    with pytest.raises(ValueError, match=message):
        fit_probe(**call)

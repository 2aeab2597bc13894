"""The fitted probe is the least-squares one."""

import numpy as np
import pytest

import parallax_core
from parallax_core import SolverError
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
    fit = fit_probe(**given, target=target, **options)
    # The normal matrix has a condition of about 1e4 here.
    np.testing.assert_allclose(fit.W_R, W_R, atol=1e-10)
    # The rows held out come from the same matrix.
    np.testing.assert_allclose(fit.score, 1, atol=1e-10)


@pytest.mark.parametrize("solver", ["normal", "lsmr"])
def test_the_fit_minimises_the_ridge_objective(solver):
    given = arrays()
    target = np.random.default_rng(2).standard_normal((2, 20, 2, 2))
    ridge = 0.03

    def objective(W_R):
        rows = 2 * 20
        error = np.square(output(W_R, **given) - target).sum((0, 1, 3)) / rows
        return error + ridge * np.square(W_R).sum((1, 2))

    W_R = fit_probe(**given, target=target, ridge=ridge, solver=solver).W_R
    rng = np.random.default_rng(3)
    for _ in range(20):
        step = 1e-4 * rng.standard_normal(W_R.shape)
        # A quadratic at its minimum: the same rise on both sides, up to rounding of the objective.
        ahead, behind = (objective(W_R + sign * step) - objective(W_R) for sign in (1, -1))
        assert (ahead > 0).all()
        np.testing.assert_allclose(ahead, behind, rtol=1e-4)


def test_a_large_ridge_leaves_softmax():
    given = arrays()
    W_R = fit_probe(**given, target=np.ones((2, 20, 2, 2)), ridge=1e12).W_R
    assert np.abs(W_R).max() < 1e-11


def stacked_design(x, q, k, v, target, head, **options):
    """The dense least-squares problem of a head: what ``fit_probe`` never forms."""
    group = q.shape[2] // k.shape[2]
    of_key = slice(head // group, head // group + 1)
    vbar, C_vk = covariances(q[:, :, [head]], k[:, :, of_key], v[:, :, of_key], **options)
    design = -np.einsum("blhec,blhx->blhecx", C_vk, x[:, :, [head]])
    return design.reshape(-1, q.shape[3] * x.shape[3]), (target[:, :, [head]] - vbar).ravel()


@pytest.mark.parametrize("Hq, Hkv, Dx", [(1, 1, 1), (4, 2, 7), (3, 1, 2)])
def test_every_head_solves_its_dense_least_squares_problem(Hq, Hkv, Dx):
    given = arrays(Hq=Hq, Hkv=Hkv, Dx=Dx, Lq=24)
    target = np.random.default_rng(4).standard_normal((2, 24, Hq, 2))
    W_R = fit_probe(**given, target=target).W_R
    for head in range(Hq):
        design, right = stacked_design(**given, target=target, head=head)
        expected = np.linalg.lstsq(design, right)[0].reshape(3, Dx)
        np.testing.assert_allclose(W_R[head], expected, rtol=1e-8, atol=1e-10)


def test_features_that_all_heads_share_are_those_of_each():
    given = arrays()
    shared = given["x"][:, :, :1]
    target = np.random.default_rng(4).standard_normal((2, 20, 2, 2))
    each = fit_probe(**given | {"x": np.repeat(shared, 2, axis=2)}, target=target)
    np.testing.assert_array_equal(fit_probe(**given | {"x": shared}, target=target).W_R, each.W_R)


def test_lsmr_keeps_the_digits_that_the_normal_equations_lose():
    given = arrays(Lq=40, Lk=44)
    given["x"][..., 3] = given["x"][..., 0] + 1e-6 * given["x"][..., 3]
    W_R = np.random.default_rng(1).standard_normal((2, 3, 4))
    target = output(W_R, **given)
    auto, normal = (fit_probe(**given, target=target, solver=solver) for solver in ("auto", "normal"))
    assert auto.solver == ("lsmr", "lsmr")
    assert (auto.condition > 1e11).all()
    # Two features that differ by 1e-6: the design's condition is some 1e7, the normal matrix's its square.
    lost = np.abs(normal.W_R - W_R).max()
    assert lost > 1e-6
    assert np.abs(auto.W_R - W_R).max() < min(1e-7, lost / 100)


def test_without_a_ridge_lsmr_takes_the_solution_of_least_norm():
    given = arrays()
    given["x"][..., 3] = given["x"][..., 0]
    target = np.random.default_rng(4).standard_normal((2, 20, 2, 2))
    fit = fit_probe(**given, target=target)
    assert fit.solver == ("lsmr", "lsmr")
    for head in range(2):
        design, right = stacked_design(**given, target=target, head=head)
        expected = np.linalg.lstsq(design, right, rcond=1e-10)[0].reshape(3, 4)
        np.testing.assert_allclose(fit.W_R[head], expected, atol=1e-9)
    with pytest.raises(SolverError, match=r"normal: .* not numerically positive definite"):
        fit_probe(**given, target=target, solver="normal")


def test_too_many_unknowns_to_factorise_are_solved_without_the_matrix():
    # 17 x 256 unknowns; with the ridge, 60 rows decide all of them.
    given = arrays(Lq=30, Hq=1, D=17, Dv=5, Dx=256)
    target = np.random.default_rng(4).standard_normal((2, 30, 1, 5))
    fit = fit_probe(**given, target=target, ridge=1e-3, held_out=0)
    assert fit.solver == ("lsmr",)
    assert np.isnan(fit.condition).all()
    design, right = stacked_design(**given, target=target, head=0)
    # The same ridge regression in its dual form, 300 equations; its condition is about 1e5.
    dual = np.linalg.solve(design @ design.T + 60 * 1e-3 * np.eye(len(right)), right)
    np.testing.assert_allclose(fit.W_R[0].ravel(), design.T @ dual, atol=1e-8)


def test_the_score_is_of_rows_that_the_fit_has_not_seen():
    given = arrays(B=5)
    target = np.random.default_rng(4).standard_normal((5, 20, 2, 2))
    fit = fit_probe(**given, target=target, ridge=0.01, held_out=0.4)
    seen = {name: array[:3] for name, array in given.items()}
    held = {name: array[3:] for name, array in given.items()}
    W_R = fit_probe(**seen, target=target[:3], ridge=0.01, held_out=0).W_R
    error, of_softmax = (
        np.square(output(matrix, **held) - target[3:]).sum((0, 1, 3)) for matrix in (W_R, 0 * W_R)
    )
    np.testing.assert_allclose(fit.score, 1 - error / of_softmax, rtol=1e-9)
    # Targets of pure noise cannot be predicted, and the score does not pretend otherwise.
    assert (fit.score < 0.1).all()
    everything = fit_probe(**given, target=target, ridge=0.01, held_out=0)
    np.testing.assert_array_equal(everything.W_R, fit.W_R)
    assert np.isnan(everything.score).all()


@pytest.mark.parametrize(
    "framework, dtype",  # JAX has no float64 unless it is switched on
    [
        ("torch", "float64"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
        ("jax", "float32"),
        ("jax", "bfloat16"),
    ],
)
def test_the_matrix_comes_back_in_the_framework_of_x(framework, dtype):
    module = pytest.importorskip(framework)
    given = arrays() | {"target": np.random.default_rng(4).standard_normal((2, 20, 2, 2))}
    if framework == "torch":
        foreign = {name: torch_tensor(module, array, dtype) for name, array in given.items()}
        rounded = {name: array.double().numpy() for name, array in foreign.items()}
    else:
        foreign = {name: module.numpy.asarray(array, dtype=dtype) for name, array in given.items()}
        rounded = {name: np.asarray(array).astype(np.float64) for name, array in foreign.items()}
    fit = fit_probe(**foreign, ridge=0.01)
    assert type(fit.W_R) is type(foreign["x"])
    assert str(fit.W_R.dtype).endswith("float64" if dtype == "float64" else "float32")
    expected = fit_probe(**rounded, ridge=0.01)
    np.testing.assert_allclose(np.asarray(fit.W_R), expected.W_R, rtol=1e-6)
    np.testing.assert_array_equal(fit.score, expected.score)


def torch_tensor(torch, array, dtype):
    return torch.tensor(array).to(getattr(torch, dtype))


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
        ({"x": np.ones((2, 20, 2, 0))}, "x: expected at least one row and one feature"),
        ({"k": np.ones((2, 24, 3, 3))}, "k: expected B, a divisor of Hq, and D"),
        ({"v": np.ones((2, 23, 1, 2))}, r"v: expected shape \(2, 24, 1, 'Dv'\)"),
        ({"ridge": -1.0}, "ridge: expected a finite number of 0 or more, got -1.0"),
        ({"ridge": np.inf}, "ridge: expected a finite number of 0 or more, got inf"),
        ({"held_out": 1}, "held_out: expected a number from 0 to below 1, got 1"),
        ({"solver": "qr"}, "solver: expected one of auto, normal, lsmr, got 'qr'"),
    ],
)
def test_bad_input_is_named(change, message):
    call = arrays() | {"target": np.ones((2, 20, 2, 2)), "ridge": 0.1} | change
    with pytest.raises(ValueError, match=message):
        fit_probe(**call)


def test_fewer_equations_than_unknowns_need_a_ridge():
    given = arrays(B=1, Lq=8, Dx=6)
    target = np.ones((1, 8, 2, 2))
    # 8 rows of 2 values for 3 x 6 unknowns
    with pytest.raises(ValueError, match=r"ridge: 0 needs .* 8 rows .* 2 equations each for 3 x 6 unknowns"):
        fit_probe(**given, target=target, held_out=0)
    assert np.isfinite(fit_probe(**given, target=target, ridge=1e-3, held_out=0).W_R).all()
    # 10 rows are enough for one fit, and 8 of them too few for another.
    given = arrays(B=1, Lq=10, Dx=6)
    target = np.ones((1, 10, 2, 2))
    fit_probe(**given, target=target, held_out=0)
    with pytest.raises(ValueError, match="8 rows to fit on"):
        fit_probe(**given, target=target, held_out=0.2)


def test_what_is_no_floating_array_is_a_type_error():
    call = arrays() | {"target": np.ones((2, 20, 2, 2)), "ridge": 0.1}
    with pytest.raises(TypeError, match="target has dtype int64"):
        fit_probe(**call | {"target": np.ones((2, 20, 2, 2), int)})
    with pytest.raises(TypeError, match="x is a list"):
        fit_probe(**call | {"x": call["x"].tolist()})


def test_numbers_whose_squares_overflow_are_an_error_and_no_nan():
    given = arrays()
    given["x"] *= 1e200
    with pytest.raises(SolverError, match="overflow"):
        fit_probe(**given, target=np.ones((2, 20, 2, 2)), ridge=0.1)

"""Comparisons measure what they name."""

import numpy as np
import pytest

import parallax_core
from parallax_core.compare import compare
from parallax_core.leave_one_out import fraction_of_variance, leave_one_out
from parallax_core.mechanisms import MECHANISMS, apply_mechanism

REFERENCE = parallax_core.reference


def arrays(B=2, L=12, Hq=4, Hkv=2, D=3, Dv=5):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(s) for s in ((B, L, Hq, D), (B, L, Hkv, D), (B, L, Hkv, Dv)))


def test_outputs_are_those_of_the_named_operations():
    q, k, v = arrays()
    r = np.random.default_rng(1).standard_normal(q.shape)
    result = compare(q, k, v, r=r, ridge=0.2, window_size=7)
    expected = {
        "softmax": REFERENCE.softmax_attention(q, k, v, window_size=7),
        "lla": REFERENCE.lla_attention(q, k, v, ridge=0.2, window_size=7),
        "parallax": REFERENCE.parallax_attention(q, r, k, v, window_size=7),
    }
    for name, output in expected.items():
        # Two float64 implementations of systems of condition below 1e3.
        np.testing.assert_allclose(result.outputs[name], output, rtol=1e-9, atol=1e-12)
    assert set(result.estimators) == set(MECHANISMS)


def test_differences_are_a_relative_distance():
    result = compare(*arrays())
    np.testing.assert_array_equal(np.diag(result.difference), 0)
    np.testing.assert_allclose(result.difference, result.difference.T, rtol=1e-15)
    a, b = result.outputs["softmax"], result.outputs["lla"]
    i, j = (result.estimators.index(name) for name in ("softmax", "lla"))
    norm = max(np.linalg.norm(a), np.linalg.norm(b))
    np.testing.assert_allclose(result.difference[i, j], np.linalg.norm(a - b) / norm, rtol=1e-14)
    # The triangle of two unit vectors: no two outputs are further apart than opposite ones.
    assert (result.difference <= 2).all()


def test_leave_one_out_is_each_row_without_its_key():
    _, k, v = arrays()
    result = compare(*arrays(), ridge=0.2)
    predictions = np.stack(
        [
            REFERENCE.lla_attention(
                k[:, [i]], np.delete(k, i, 1), np.delete(v, i, 1), ridge=0.2, causal=False
            )[:, 0]
            for i in range(k.shape[1])
        ],
        axis=1,
    )
    expected = fraction_of_variance(predictions, v).mean()
    np.testing.assert_allclose(result.leave_one_out[result.estimators.index("lla")], expected, rtol=1e-10)


def test_the_mean_value_leaves_the_whole_variance():
    _, _, v = arrays()
    mean = np.broadcast_to(v.mean(1, keepdims=True), v.shape)
    np.testing.assert_allclose(fraction_of_variance(mean, v), 1, rtol=1e-14)


def test_values_linear_in_the_keys_are_predicted_exactly_by_what_fits_lines():
    q, k, _ = arrays()
    v = np.einsum("blhd,de->blhe", k, np.random.default_rng(3).standard_normal((3, 5)))
    result = compare(q, k, v, ridge=1e-10)
    error = dict(zip(result.estimators, result.leave_one_out))
    # ridge over the least eigenvalue of a covariance of 11 keys, squared
    assert error["lla"] < 1e-12
    assert error["global-ridge"] < 1e-12
    assert error["softmax"] > 1e-2


def test_half_precision_of_another_framework_is_taken():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.tensor(array).to(torch.bfloat16) for array in arrays())
    result = compare(q, k, v)
    rounded = compare(*(array.to(torch.float64).numpy() for array in (q, k, v)))
    np.testing.assert_array_equal(result.difference, rounded.difference)


def test_bad_input_is_named():
    q, k, v = arrays()
    with pytest.raises(ValueError, match=r"k: expected shape .* n >= 2, got \(1, 1, 1, 3\)"):
        leave_one_out(np.ones((1, 1, 1, 3)), np.ones((1, 1, 1, 3)))
    with pytest.raises(ValueError, match="v: expected shape"):
        leave_one_out(k, v[:, 1:])
    with pytest.raises(ValueError, match=r"name: expected one of softmax, .* got 'mamba'"):
        apply_mechanism("mamba", q, k, v)
    with pytest.raises(ValueError, match=r"probe: .* got None"):
        apply_mechanism("parallax", q, k, v)

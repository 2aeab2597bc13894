"""Comparisons measure what they name."""

import json

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


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window_size": 5, "scale": 1.3}])
def test_rows_are_measured_on_their_own_weights_and_keys(options):
    q, k, v = arrays()
    ridge = 0.2
    result = compare(q, k, v, ridge=ridge, **options)
    # Row by row, from the textbook's covariance with frequency weights.
    for b, i, h in np.ndindex(*q.shape[:3]):
        last = i if options.get("causal", True) else 11
        first = max(0, last + 1 - options.get("window_size", 12))
        keys = k[b, first : last + 1, h // 2]
        scores = options.get("scale", 3**-0.5) * keys @ q[b, i, h]
        p = np.exp(scores - scores.max())
        p /= p.sum()
        measured = {name: values[b, i, h] for name, values in result.rows.items()}
        np.testing.assert_allclose(measured["effective_neighbours"], np.prod(p**-p), rtol=1e-10)
        if len(keys) <= 3:
            assert measured["condition"] == np.inf
            assert measured["effective_rank"] <= len(keys) - 1 + 1e-12
            continue
        values = np.linalg.eigvalsh(np.cov(keys.T, aweights=p, ddof=0))
        share = values / values.sum()
        np.testing.assert_allclose(measured["effective_rank"], np.prod(share**-share), rtol=1e-9)
        np.testing.assert_allclose(measured["condition"], values[2] / values[0], rtol=1e-8)
        np.testing.assert_allclose(
            measured["ridge_condition"], (values[2] + ridge) / (values[0] + ridge), rtol=1e-8
        )


def test_identical_keys_have_no_spread_and_all_the_neighbours():
    q, k, v = arrays()
    result = compare(q, np.full_like(k, 1 / 3), v, causal=False)
    np.testing.assert_allclose(result.rows["effective_neighbours"], 12, rtol=1e-12)
    np.testing.assert_array_equal(result.rows["effective_rank"], 0)
    np.testing.assert_array_equal(result.rows["condition"], np.inf)
    np.testing.assert_array_equal(result.rows["ridge_condition"], 1)


def test_fewer_rows_are_some_of_all_rows():
    q, k, v = arrays()
    every, some = compare(q, k, v), compare(q, k, v, rows=2 * 4 * 5)
    assert some.rows["condition"].shape == (2, 5, 4)
    chosen = np.linspace(0, 11, 5).round().astype(int)
    for name in every.rows:
        np.testing.assert_array_equal(some.rows[name], every.rows[name][:, chosen])


def test_the_distance_of_a_probe_counts_what_the_probe_does():
    q, k, v = arrays()
    solved = parallax_core.lla_probe(q, k, ridge=0.1)
    for factor in (1.0, 0.0, 1.5, -1.0):
        far = compare(q, k, v, r=factor * solved).probe_distance["parallax"]
        np.testing.assert_allclose(far, abs(1 - factor), atol=1e-12)
    # All keys in a plane: what a probe has across it changes no output.
    k[..., 2] = 0.0
    r = parallax_core.lla_probe(q, k, ridge=0.1)
    r[..., 2] += 7.0
    result = compare(q, k, v, r=r)
    far = result.probe_distance["parallax"]
    assert far.in_C_kk < 1e-12 < 0.1 < far.euclidean
    i, j = (result.estimators.index(name) for name in ("parallax", "lla"))
    assert result.difference[i, j] < 1e-12


def test_a_fitted_probe_is_the_linear_one_nearest_to_lla():
    q, k, v = arrays(B=3, L=40)
    result = compare(q, k, v, x=q, r=0.3 * q, probe_ridge=0.0)
    assert result.estimators[-1] == "parallax-fitted"
    lla = result.outputs["lla"]
    fitted = np.linalg.norm(result.outputs["parallax-fitted"] - lla)
    # Softmax and a multiple of the query are linear probes too.
    assert fitted < np.linalg.norm(result.outputs["parallax"] - lla)
    assert fitted < np.linalg.norm(result.outputs["softmax"] - lla)
    probe = np.einsum("hdx,blhx->blhd", result.fit.W_R, q)
    again = compare(q, k, v, r=probe)
    np.testing.assert_allclose(result.outputs["parallax-fitted"], again.outputs["parallax"], rtol=1e-12)
    assert again.probe_distance["parallax"] == result.probe_distance["parallax-fitted"]


def test_a_fitted_probe_predicts_a_sequence_it_has_not_seen():
    q, k, v = arrays(B=3, L=14)
    index = -1
    before = compare(q, k, v, x=q).leave_one_out[index]
    # Values of one sequence doubled: a probe that had seen them would still leave the same fractions.
    other = v.copy()
    other[0] *= 2
    after = compare(q, k, other, x=q).leave_one_out[index]
    assert abs(after - before) > 1e-6
    # All doubled, every probe is fitted to a ridge a quarter as large.
    np.testing.assert_allclose(
        compare(q, k, 2 * v, x=q, probe_ridge=4.0).leave_one_out[index], before, rtol=1e-9
    )
    assert np.isnan(compare(q[:1], k[:1], v[:1], x=q[:1]).leave_one_out[index])


def test_json_holds_the_numbers_and_no_nan():
    q, k, v = arrays()
    result = compare(q, k, v, r=q, x=q)
    read = json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["estimators"] == list(result.estimators)
    np.testing.assert_array_equal(read["difference"], result.difference)
    assert read["leave_one_out"]["lla"] == result.leave_one_out[result.estimators.index("lla")]
    assert read["leave_one_out"]["parallax"] is None
    # A quarter of the causal rows sees three keys or fewer, too few for three dimensions.
    assert read["quantiles"]["condition"][-1] is None
    np.testing.assert_array_equal(read["quantiles"]["effective_rank"], result.quantiles("effective_rank"))
    assert read["probe_distance"]["parallax"]["in_C_kk"] == result.probe_distance["parallax"].in_C_kk
    assert read["fit"]["solver"] == list(result.fit.solver)
    assert read["rows"] == 2 * 12 * 4


def test_quantiles_leave_out_rows_without_keys_and_pass_infinity_through():
    q, k, v = arrays()
    # More queries than keys: the first ten of them see none.
    result = compare(q, k[:, :2], v[:, :2])
    assert result.to_dict()["rows"] == 2 * 2 * 4
    np.testing.assert_array_equal(result.quantiles("condition"), np.inf)
    assert np.isnan(result.rows["effective_neighbours"][:, :10]).all()


def test_the_command_writes_the_numbers_of_every_layer(tmp_path, capsys):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    from parallax_core.cli import main

    tensors = {f"{layer}.{name}": array for layer in "ab" for name, array in zip("qkv", arrays(B=3, L=10))}
    tensors["b.v"] = tensors["b.v"] ** 2
    save_file(tensors, tmp_path / "heads.safetensors", {"causal": "false"})
    written = tmp_path / "compare.json"
    with pytest.raises(SystemExit) as done:
        main(["compare", str(tmp_path / "heads.safetensors"), "--fit", "0.5", "--json", str(written)])
    assert done.value.code == 0
    read = json.loads(written.read_text())
    assert {name: read[name] for name in ("ridge", "causal", "probe_ridge", "heads")} == {
        "ridge": 0.1, "causal": False, "probe_ridge": 0.5, "heads": [0, 1],
    }  # fmt: skip
    for layer in "ab":
        q, k, v = (tensors[f"{layer}.{name}"] for name in "qkv")
        expected = compare(q, k, v, x=q, probe_ridge=0.5, causal=False).to_dict()
        found = read["layers"][layer]
        assert found.keys() == expected.keys()
        # The arrays from the file have other strides, and so other orders of summation.
        np.testing.assert_allclose(found["difference"], expected["difference"], atol=1e-12)
        assert found["leave_one_out"] == pytest.approx(expected["leave_one_out"], rel=1e-9)
        assert found["fit"]["score"] == pytest.approx(expected["fit"]["score"], rel=1e-9)
        for name, values in expected["quantiles"].items():
            assert found["quantiles"][name] == pytest.approx(values, rel=1e-9)
    out = capsys.readouterr().out
    assert f"JSON: {written}" in out
    far = expected["probe_distance"]["parallax-fitted"]
    assert f"{far['in_C_kk']:.3f}" in out
    assert f"{expected['quantiles']['effective_rank'][2]:.4g}" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--fit", "-1"], "'--fit'"),
        (["--fit", "0"], "b: ridge: 0 needs as many equations"),
        (["--json", "/absent/compare.json"], "--json: expected an existing folder"),
    ],
)
def test_bad_input_of_the_command_is_one_line(tmp_path, capsys, arguments, message):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    from parallax_core.cli import main

    save_file({f"b.{n}": a for n, a in zip("qkv", arrays(B=1, L=3))}, tmp_path / "b.safetensors")
    with pytest.raises(SystemExit) as done:
        main(["compare", str(tmp_path / "b.safetensors"), *arguments])
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


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
    with pytest.raises(ValueError, match="rows: expected a positive integer, got 0"):
        compare(q, k, v, rows=0)
    with pytest.raises(ValueError, match="v: expected finite numbers"):
        compare(q, k, np.full_like(v, np.nan))
    with pytest.raises(TypeError, match="q is a list"):
        compare(q.tolist(), k, v)
    with pytest.raises(ValueError, match=r"name: expected one of softmax, .* got 'mamba'"):
        apply_mechanism("mamba", q, k, v)
    with pytest.raises(ValueError, match=r"probe: .* got None"):
        apply_mechanism("parallax", q, k, v)

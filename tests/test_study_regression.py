"""The regression study measures what the theory and independent computations say."""

import numpy as np
import pytest

import parallax_core
from parallax_core.data import AttentionSample, load_sample
from parallax_core.distributed.config import parse_config
from parallax_core.distributed.engine import run_ray
from parallax_core.distributed.findings import find
from parallax_core.distributed.grid import points
from parallax_core.distributed.point import Point, PointError
from parallax_core.distributed.regression import evaluate
from parallax_core.distributed.study import run_regression
from parallax_core.leave_one_out import fraction_of_variance, leave_one_out

SMALL = """
seed: 5
resamples: 100
exponents:
  - {where: boundary, estimators: [softmax, lla], n: 300, bandwidth: [0.05, 0.07, 0.1, 0.14], ridge: 1.0e-10,
     replicates: 4}
convergence:
  - {problem: piecewise, estimators: [lla, parallax-fitted], n: [32, 48, 64], d: 4, bandwidth: 0.4,
     ridge: 0.01, noise: 0.1, replicates: 4}
real:
  {estimators: [softmax], layers: [layer5], heads: 1, ridge: 0.1}
"""


def synthetic(**fields):
    return Point(
        **{
            "experiment": "test",
            "problem": "smooth",
            "estimator": "lla",
            "n": 64,
            "d": 1,
            "bandwidth": 0.1,
            "ridge": 1e-8,
            "noise": 0.1,
            "replicates": 8,
        }
        | fields
    )


def kv(estimator, layer, **fields):
    return Point(
        experiment="test",
        problem="kv",
        estimator=estimator,
        n=256,
        d=32,
        bandwidth=32**0.25,
        kernel="dot",
        ridge=0.1,
        probe_ridge=1.0,
        layer=layer,
        heads=(0, 3, 6, 9),
        **fields,
    )


@pytest.fixture(scope="module")
def sample():
    return load_sample()


@pytest.mark.parametrize("backend", ["core", "reference"])
@pytest.mark.parametrize(
    "estimator, options, expected",
    [
        ("softmax_attention", {}, {"layer0": 0.645, "layer5": 0.780}),
        ("lla_attention", {"ridge": 0.1}, {"layer0": 0.329, "layer5": 0.485}),
    ],
)
def test_leave_one_out_on_real_heads_from_either_backend(sample, backend, estimator, options, expected):
    attention = getattr(parallax_core if backend == "core" else parallax_core.reference, estimator)
    for layer, error in expected.items():
        chosen = sample.select(layer)
        q, k, v, mask = leave_one_out(chosen.k, chosen.v)
        measured = fraction_of_variance(attention(q, k, v, **options, **mask), chosen.v).mean()
        assert abs(measured - error) < 0.001  # the published figures have three digits


@pytest.mark.parametrize("layer, softmax, lla", [("layer0", 0.645, 0.329), ("layer5", 0.780, 0.485)])
def test_the_study_reports_the_same_errors(sample, layer, softmax, lla):
    assert abs(evaluate(kv("softmax", layer), sample)["error"] - softmax) < 0.001
    row = evaluate(kv("lla", layer), sample)
    assert abs(row["error"] - lla) < 0.001
    assert np.shape(row["errors"]) == (4, 4)
    solved = evaluate(kv("parallax-solved", layer), sample)
    # The probe is solved here from covariances, there by the backend: float64 twice, condition about 1e3.
    np.testing.assert_allclose(solved["errors"], row["errors"], rtol=1e-9)


def test_a_left_out_key_has_no_part_in_its_own_prediction(sample):
    chosen = sample.select("layer0", (0,))
    k, v = chosen.k[:1, :40], chosen.v[:1, :40]
    q, keys, values, mask = leave_one_out(k, v)
    predictions = parallax_core.softmax_attention(q, keys, values, **mask)
    for i in (0, 17, 39):
        rest = np.delete(np.arange(40), i)
        alone = parallax_core.softmax_attention(k[:, i : i + 1], k[:, rest], v[:, rest], causal=False)
        # The same 39 keys in another order.
        np.testing.assert_allclose(predictions[:, i], alone[:, 0], rtol=1e-12, atol=1e-14)


def test_the_fitted_probe_never_sees_the_document_it_predicts(sample):
    point = kv("parallax-fitted", "layer0").model_copy(update={"heads": (0, 3)})

    def errors(document_1):
        arrays = [array[:, :48, :2, :8].astype(float) for array in sample.layers["layer0"]]
        arrays[2][1] *= document_1
        return np.array(evaluate(point, AttentionSample({"layer0": arrays}, (0, 3), {}, "part"))["errors"])

    # Document 1 is predicted by a probe fitted on the others. Its values doubled, that same probe leaves the
    # same fraction of a variance four times as large; the other documents get other probes.
    before, after = errors(1.0), errors(2.0)
    np.testing.assert_allclose(after[1], before[1], rtol=1e-9)
    assert (np.abs(after - before)[[0, 2, 3]] > 1e-6).all()


def test_boundary_exponents_contain_the_theory():
    text = """
    resamples: 400
    exponents:
      - {where: boundary, estimators: [softmax, lla], n: 4000, ridge: 1.0e-10, replicates: 100,
         bandwidth: [0.02, 0.027, 0.036, 0.048, 0.064, 0.085, 0.1]}
    """
    config = parse_config(text)
    softmax, lla = find(config, run_regression(config).rows).exponents
    for curve, p in ((softmax, 1), (lla, 2)):
        assert curve.exponent.contains(p)
        assert curve.exponent.width < 0.3


def test_rows_do_not_depend_on_engine_order_or_other_points(sample):
    config = parse_config(SMALL)
    rows = run_regression(config, sample).rows
    for point, row in reversed(list(zip(points(config, sample), rows))):
        assert evaluate(point, sample) == row


def test_ray_gives_the_rows_of_the_local_engine_and_names_the_point_that_fails(sample, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    grid = points(parse_config(SMALL), sample)
    broken = kv("softmax", "layer9")
    rows = {}

    def collect():
        for index, row in run_ray(evaluate, [*grid, broken], sample, workers=2):
            rows[index] = row

    with pytest.raises(PointError, match=r"softmax on kv layer9.*layer: .* got 'layer9'"):
        collect()
    assert len(rows) >= len(grid) - 1  # the other worker may still have been busy
    for index, row in rows.items():
        local = evaluate(grid[index], sample)
        assert row.keys() == local.keys()
        for name in row:
            if name.endswith("errors"):
                # Workers have one thread each, and a BLAS may split its sums by threads.
                np.testing.assert_allclose(row[name], local[name], rtol=1e-9)
            elif name in Point.model_fields:
                assert row[name] == local[name]


def test_progress_counts_every_point(sample):
    seen = []
    rows = run_regression(
        parse_config(SMALL), sample, progress=lambda done, total, point: seen.append((done, total))
    ).rows
    assert seen == [(i + 1, len(rows)) for i in range(len(rows))]


def test_the_seed_decides_the_rows():
    assert evaluate(synthetic(seed=1)) == evaluate(synthetic(seed=1))
    assert evaluate(synthetic(seed=1))["interior_errors"] != evaluate(synthetic(seed=2))["interior_errors"]


def test_estimators_and_bandwidths_see_the_same_sequences():
    # Parallax with the solved probe is LLA only on the same data; one bandwidth is then the other's limit.
    lla, solved = (
        np.array(evaluate(synthetic(estimator=e))["boundary_errors"]) for e in ("lla", "parallax-solved")
    )
    np.testing.assert_allclose(solved, lla, rtol=1e-7)
    wide = [evaluate(synthetic(estimator="softmax", bandwidth=h))["interior_errors"] for h in (1e3, 1e4)]
    np.testing.assert_allclose(*wide, rtol=1e-4)


def test_lla_is_exact_on_the_noise_free_linear_problem():
    row = evaluate(synthetic(problem="linear", noise=0.0, d=2, ridge=1e-12))
    # ridge / C_kk is below 1e-9 at this bandwidth, and so is the error.
    assert np.abs(row["boundary_errors"]).max() < 1e-8
    assert evaluate(synthetic(problem="linear", noise=0.0, d=2, estimator="softmax"))["boundary_bias2"] > 1e-4


def test_a_failing_point_is_named():
    with pytest.raises(PointError, match=r"test: lla on kv layer0, n=256, .*seed=3: ValueError: sample"):
        evaluate(kv("lla", "layer0", seed=3))


@pytest.mark.parametrize("arguments", [{"engine": "local", "workers": 2}, {"engine": "dask"}])
def test_bad_engine_arguments(arguments):
    with pytest.raises(ValueError, match=r"^(workers|engine): expected"):
        run_regression(parse_config(SMALL), **arguments)


def test_a_ridge_of_zero_is_the_minimum_norm_solution_for_both_ways_to_lla():
    # Three keys in four dimensions leave C_kk singular; a wide kernel gives each of them some weight.
    rows = [
        evaluate(synthetic(problem="piecewise", n=3, d=4, bandwidth=2.0, ridge=0.0, estimator=e))
        for e in ("lla", "parallax-solved")
    ]
    np.testing.assert_allclose(rows[1]["interior_errors"], rows[0]["interior_errors"], rtol=1e-6)

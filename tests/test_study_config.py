"""A study's configuration is validated before anything runs, in one line that names the key."""

import pytest

from parallax_core.data import load_sample
from parallax_core.distributed.config import default_config_text, load_config, parse_config
from parallax_core.distributed.grid import points
from parallax_core.distributed.study_file import ConfigError

CONVERGENCE = """
convergence:
  - {{problem: {problem}, estimators: [{estimator}], n: [8, 16, 32], bandwidth: {bandwidth}, ridge: {ridge},
     noise: 0.1, replicates: 2{more}}}
"""


def convergence(problem="smooth", estimator="lla", bandwidth="0.1", ridge="1e-6", more=""):
    return CONVERGENCE.format(
        problem=problem, estimator=estimator, bandwidth=bandwidth, ridge=ridge, more=more
    )


@pytest.mark.parametrize(
    "text, message",
    [
        (convergence(problem="cubic"), r"convergence\.0\.problem: .*'cubic'"),
        (convergence(estimator="mamba"), r"convergence\.0\.estimators\.0: .*'mamba'"),
        (convergence(bandwidth="-1"), r"convergence\.0\.bandwidth\.constant: .*got -1"),
        (convergence(bandwidth=".nan"), r"convergence\.0\.bandwidth\.constant: .*finite"),
        (convergence(ridge="-1e-6"), r"convergence\.0\.ridge: "),
        (convergence(more=", nosie: 3"), r"convergence\.0\.nosie: unknown key"),
        ("sed: 3\nreal: {estimators: [lla], ridge: 0.1}", "sed: unknown key"),
        ("real: {estimators: [lla]}", r"real\.ridge: missing"),
        ("seed: 1", "at least one of convergence"),
        ("- a\n- b", "expected keys and values, got list"),
        ("a: [1", "line [0-9]: not YAML"),
    ],
)
def test_the_error_is_one_line_that_names_the_key(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(text)
    assert "\n" not in str(caught.value)


def test_a_bandwidth_rule_shrinks_and_a_number_stays():
    config = parse_config(convergence(bandwidth="{constant: 0.5, rate: 0.5}"))
    assert [p.bandwidth for p in points(config, None)] == pytest.approx([0.5 * n**-0.5 for n in (8, 16, 32)])
    assert {p.bandwidth for p in points(parse_config(convergence(bandwidth="0.3")), None)} == {0.3}


def test_the_default_grid_asks_what_the_report_shows():
    config = load_config()
    sample = load_sample()
    listed = points(config, sample)
    assert len({point.label for point in listed}) == len(listed)
    assert {p.problem for p in listed} == {"linear", "smooth", "piecewise", "kv"}
    estimators = {"softmax", "lla", "parallax-solved", "parallax-fitted", "global-ridge", "linear-attention"}
    assert {p.estimator for p in listed if p.problem == "kv"} == estimators
    assert {p.heads for p in listed if p.problem == "kv"} == {(0, 3, 6, 9)}
    # A ridge above 1e-9 would flatten LLA's slope.
    assert all(p.ridge <= 1e-9 and p.noise == 0 for p in listed if p.experiment.endswith("exponent"))
    assert default_config_text().startswith("# The default grid")


def test_layers_and_heads_that_the_file_lacks_are_named():
    sample = load_sample()
    real = "real: {{estimators: [lla], ridge: 0.1, {choice}}}"
    with pytest.raises(ValueError, match=r"heads: .* has heads 0, 3, 6, 9, got 1"):
        points(parse_config(real.format(choice="heads: [1, 3]")), sample)
    with pytest.raises(ValueError, match=r"layer: .* has layer0, layer5, got 'layer7'"):
        points(parse_config(real.format(choice="layers: [layer7]")), sample)
    layer0 = tuple(array[:1] for array in sample.layers["layer0"])
    alone = type(sample)({"layer0": layer0}, sample.heads, {}, "one.safetensors")
    fitted = "real: {estimators: [parallax-fitted], ridge: 0.1}"
    with pytest.raises(ValueError, match=r"estimators: parallax-fitted .* one.safetensors has 1"):
        points(parse_config(fitted), alone)
    with pytest.raises(ValueError, match="real: needs a file"):
        points(parse_config(real.format(choice="heads: all")), None)

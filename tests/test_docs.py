"""What the documentation shows runs, and the numbers that it states are those that come out."""

import re
from pathlib import Path

import numpy as np
import pytest

import parallax_core
from parallax_core import cuda_kernels
from parallax_core.compare import compare
from parallax_core.data import load_sample

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(page, heading=None):
    """The Python blocks of a page, or of the section below a heading of level 2."""
    text = (DOCS / page).read_text()
    if heading is not None:
        text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    assert found, f"{page} has no Python block under {heading}"
    return found


def rows(page, heading=None):
    """The cells of every table row of a page, or of what stands between a heading and the next."""
    text = (DOCS / page).read_text()
    if heading is not None:
        text = text.partition(f"\n{heading}\n")[2].partition("\n#")[0]
    lines = re.findall(r"^\| (.*) \|$", text, flags=re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


@pytest.mark.parametrize("framework, package", [("NumPy", "numpy"), ("PyTorch", "torch"), ("JAX", "jax")])
def test_the_example_of_each_framework_runs(framework, package):
    pytest.importorskip(package)
    for code in blocks("frameworks.md", framework):
        exec(compile(code, f"frameworks.md, {framework}", "exec"), {})


@pytest.mark.gpu
def test_the_example_of_cupy_runs():
    reason = cuda_kernels.availability()
    if reason is not None:
        pytest.skip(reason)
    for code in blocks("frameworks.md", "CuPy"):
        exec(compile(code, "frameworks.md, CuPy", "exec"), {})


def test_the_example_of_cupy_differs_from_that_of_numpy_in_the_arrays_alone():
    (cupy,), (numpy,) = blocks("frameworks.md", "CuPy"), blocks("frameworks.md", "NumPy")
    call = "o = plx.parallax_attention(q, r, k, v)"
    assert call in cupy
    assert call in numpy
    compile(cupy, "frameworks.md, CuPy", "exec")


def test_the_examples_of_the_front_page_run_one_after_the_other(capsys):
    namespace = {}
    for code in blocks("index.md"):
        exec(compile(code, "index.md", "exec"), namespace)
    assert "leave_one_out" in capsys.readouterr().out


def test_every_public_name_is_documented():
    text = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"^::: (\S+)$", text, flags=re.M))
    if "parallax_core.compare.compare" in documented:  # the name alone is also that of its module
        documented.add("parallax_core.compare")
    expected = {
        f"parallax_core.{name}" for name in parallax_core.__all__ if name not in ("__version__", "reference")
    } | {
        f"parallax_core.reference.{name}"
        for name in parallax_core.reference.__all__
        if name != "merge_states"
    }
    assert expected <= documented
    # A module is asked for the members that it declares, no more and no fewer.
    for module in ("torch", "jax"):
        listed = re.search(
            rf"^::: parallax_core.frameworks.{module}\n.*?members: \[(.*?)\]", text, flags=re.M | re.S
        )
        source = (ROOT / "parallax_core" / "frameworks" / f"{module}.py").read_text()
        declared = re.search(r"^__all__ = \[(.*?)\]", source, flags=re.M | re.S)
        assert sorted(listed[1].split(", ")) == sorted(re.findall(r'"(\w+)"', declared[1]))


@pytest.mark.parametrize("layer, column, fitted", [("layer0", 1, False), ("layer5", 2, True)])
def test_the_numbers_of_the_comparison_on_real_data_are_those_of_compare(layer, column, fitted):
    sample = load_sample().select(layer)
    q, k, v, _ = sample
    result = compare(q, k, v, causal=False, **({"x": q, "probe_ridge": 1.0} if fitted else {}))
    table = {cells[0]: cells[column] for cells in rows("lla-and-parallax.md") if len(cells) == 3}
    errors = dict(zip(result.estimators, result.leave_one_out))
    softmax, lla = (result.estimators.index(name) for name in ("softmax", "lla"))
    stated = {
        "softmax": errors["softmax"],
        "LLA": errors["lla"],
        "global ridge": errors["global-ridge"],
        "linear attention": errors["linear-attention"],
        "softmax's output from LLA's, relative": result.difference[softmax, lla],
        "effective neighbours, of 256 keys": result.quantiles("effective_neighbours")[2],
        "effective rank of `C_kk`, of 32": result.quantiles("effective_rank")[2],
        "condition of `C_kk`": result.quantiles("condition")[2],
        "condition of `C_kk + 0.1 I`": result.quantiles("ridge_condition")[2],
    }
    if fitted:
        parallax = result.estimators.index("parallax-fitted")
        far = result.probe_distance["parallax-fitted"].in_C_kk
        stated |= {
            "Parallax, fitted": errors["parallax-fitted"],
            "fitted Parallax's output from LLA's, relative": result.difference[parallax, lla],
            "fitted probe from the solved one, in the norm of `C_kk`": far,
        }
        scores = [float(part) for part in table["score on the document held out, by head"].split(", ")]
        np.testing.assert_allclose(scores, result.fit.score, atol=6e-4)
    for name, value in stated.items():
        # The page rounds to three decimals or four digits.
        np.testing.assert_allclose(float(table[name]), value, rtol=6e-4, atol=6e-4, err_msg=name)


@pytest.mark.parametrize("section, factor", [("Outputs", 2), ("Gradients", 3)])
def test_the_error_tables_are_whole_and_hold_what_numerics_promises(section, factor):
    measured = {tuple(cells[:2]): cells[2:] for cells in rows("numerics.md", f"### {section}")}
    measured = {key: cells for key, cells in measured.items() if "/" in "".join(cells)}
    assert len({keys for keys, _ in measured}) * 4 == len(measured) == 20
    for (keys, dtype), cells in measured.items():
        for cell in cells:
            ours, plain = map(float, cell.split(" / "))
            # Within a few rounding units of float64 the plain formula is now and then exact by luck.
            assert ours <= max(factor * plain, 1e-15), (keys, dtype, cell)
        if dtype in ("float16", "bfloat16") and keys.startswith("offset"):
            for cell, without in zip(cells, measured["random keys", dtype]):
                assert float(cell.split(" / ")[0]) <= 2 * float(without.split(" / ")[0]), (keys, dtype, cell)

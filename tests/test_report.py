"""A report is self-contained, says what was measured, and holds the rows it was made from."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest

from parallax_core.data import load_sample
from parallax_core.distributed.config import parse_config
from parallax_core.distributed.findings import find
from parallax_core.distributed.report import write_report
from parallax_core.distributed.report_files import Provenance
from parallax_core.distributed.study import run_regression

TEXT = """
seed: 11
resamples: 100
convergence:
  - {problem: smooth, estimators: [softmax, lla, global-ridge], n: [32, 64, 128], bandwidth: 0.2,
     ridge: 1.0e-6, noise: 0.1, replicates: 6}
tradeoff: {estimators: [softmax, lla], n: 100, bandwidth: [0.05, 0.1, 0.2, 0.4], ridge: 1.0e-8, noise: 0.1,
  replicates: 6}
exponents:
  - {where: boundary, estimators: [softmax, lla], n: 300, bandwidth: [0.05, 0.07, 0.1, 0.14], ridge: 1.0e-10,
     replicates: 6}
real: {estimators: [softmax, linear-attention], layers: [layer5], heads: [3], ridge: 0.1}
"""


@pytest.fixture(scope="module")
def study():
    return run_regression(parse_config(TEXT), load_sample())


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    provenance = Provenance("parallax-core study <regression>", "this process", 1.0)
    write_report(study, find(study.config, study.rows), folder, provenance)
    return folder


def test_the_page_loads_nothing_and_runs_nothing(report):
    page = (report / "report.html").read_text()
    # Namespaces are names, not addresses that anything loads.
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert all(link.startswith("#") for link in links)
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "<regression>" not in page  # the command is text, whatever it holds
    assert "&lt;regression&gt;" in page


def test_every_figure_is_well_formed_and_no_two_share_an_id_that_differs(report):
    page = (report / "report.html").read_text()
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == 5
    clips: dict[str, int] = {}
    for number, figure in enumerate(figures):
        ElementTree.fromstring(figure)
        for clip in re.findall(r'<clipPath id="([^"]+)"', figure):
            assert clips.setdefault(clip, number) == number


def test_numbers_in_page_and_summary_are_those_of_the_findings(report, study):
    findings = find(study.config, study.rows)
    page, summary = ((report / name).read_text() for name in ("report.html", "summary.md"))
    for curve in findings.exponents:
        p = curve.exponent
        assert f">{p.estimate:.3f}<" in page
        assert f"{p.estimate:.3f} [{p.low:.3f}, {p.high:.3f}] | {curve.theory} |" in summary
    for result in findings.real:
        assert f"{result.error.estimate:.3f}"[:4] in page
        assert f"{result.error.estimate:.3f} [" in summary
    for expected in ("seed", "11", "machine", "CPUs", "minilm_qkv_sample.safetensors"):
        assert expected in page
        assert expected in summary


def test_the_rows_survive_parquet_and_give_the_same_findings(report, study):
    rows = pq.read_table(report / "rows.parquet").to_pylist()
    assert len(rows) == len(study.rows)
    again, before = find(study.config, rows), find(study.config, study.rows)
    assert [curve.exponent for curve in again.exponents] == [curve.exponent for curve in before.exponents]
    assert [result.error for result in again.real] == [result.error for result in before.real]
    for row in rows:
        if row["problem"] != "kv":
            total = row["interior_bias2"] + row["interior_variance"]
            np.testing.assert_allclose(row["interior_mse"], total, rtol=1e-10)


def test_the_configuration_beside_the_report_is_the_study(report, study):
    assert parse_config((report / "config.yaml").read_text()) == study.config


def test_parts_that_were_not_run_are_not_shown(tmp_path):
    config = parse_config("real: {estimators: [lla], layers: [layer0], heads: [0], ridge: 0.1}")
    study = run_regression(config, load_sample())
    write_report(study, find(config, study.rows), tmp_path, Provenance("c", "this process", 1.0))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "bandwidth h" not in page

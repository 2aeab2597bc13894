"""The command line: what it prints, how it fails, and that it leaves nothing half done."""

import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from parallax_core.cli import main
from parallax_core.distributed import study as study_module
from parallax_core.distributed.point import PointError

SMALL = """
resamples: 100
exponents:
  - {where: boundary, estimators: [softmax, lla], n: 300, bandwidth: [0.05, 0.07, 0.1, 0.14], ridge: 1.0e-10,
     replicates: 4}
"""
DECODE = """
rounds: 5
seconds: 0.001
rotation: 1
cpu: [{operations: [parallax, lla], dtypes: [float32], shapes: [[1, 4, 2, 64, 16]]}]
"""
FILES = ["config.yaml", "report.html", "rows.parquet", "summary.md"]


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return call


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def qkv(tmp_path):
    def write(metadata=None, **tensors):
        path = tmp_path / "heads.safetensors"
        save_file(tensors, path, metadata)
        return path

    return write


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_a_study_ends_with_the_path_of_its_report(run, config, tmp_path):
    status, out, _ = run(
        "study", "regression", "--engine", "local", "--config", config, "--output", tmp_path / "o"
    )
    assert status == 0
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'o' / 'report.html'}"
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == FILES


def test_a_second_report_replaces_the_first_and_nothing_else(run, config, tmp_path):
    command = ("study", "regression", "--engine", "local", "--config", config, "--output", tmp_path / "o")
    run(*command)
    (tmp_path / "o" / "notes.txt").write_text("mine")
    status, _, _ = run(*command, "--seed", 5)
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == sorted([*FILES, "notes.txt"])
    assert "seed: 5" in (tmp_path / "o" / "config.yaml").read_text()


def test_a_point_that_fails_is_named_and_leaves_nothing(run, config, tmp_path, monkeypatch):
    def fail(point, sample):
        raise PointError(f"{point.label}: no")

    monkeypatch.setattr(study_module, "evaluate", fail)
    status, _, err = run(
        "study", "regression", "--engine", "local", "--config", config, "--output", tmp_path / "o"
    )
    assert status == 1
    assert "softmax on smooth, n=300" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.yaml"]


def test_the_decode_study_prints_its_rows_and_the_path_of_its_report(run, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(DECODE)
    command = ("study", "decode", "--device", "cpu", "--output", tmp_path / "o")
    status, out, _ = run(*command, "--config", grid, "--seed", 3)
    assert status == 0
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'o' / 'report.html'}"
    assert out.count("1×4/2×64×16") == 4
    assert "…" not in out  # every number is there, also where the output is no terminal
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == FILES
    written = tmp_path / "o" / "config.yaml"
    assert "seed: 3" in written.read_text()
    assert run(*command, "--config", written)[0] == 0
    status, out, _ = run(*command, "--config", grid, "--peer", "fa2")
    assert status == 0
    assert out.count("1×4/2×64×16") == 4
    assert yaml.safe_load(written.read_text())["peers"] == ["fa2"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workers", "2"], "--workers: expected with --engine ray only, got 2"),
        (["--engine", "dask"], "'--engine'"),
        (["--device", "tpu"], "'--device'"),
        (["--device", "cpu", "--fa3", "x.so"], "--fa3: expected with a GPU, got x.so"),
        (["--device", "cpu", "--host-cost"], "--host-cost: expected with a GPU"),
        (["--peer", "fa4"], "'--peer'"),
        (["--config", "absent.yaml"], "--config absent.yaml: no file"),
        (["--device", "cpu", "--output", f"{__file__}/x"], "--output: .* is a file"),
    ],
)
def test_bad_input_of_the_decode_study_is_one_line_that_names_the_argument(
    run, monkeypatch, arguments, message
):
    monkeypatch.setattr(study_module, "measure", refuse)
    status, out, err = run("study", "decode", *arguments)
    assert status == 2
    assert out == ""
    (line,) = err.splitlines()
    assert re.search(message, line), line


def test_a_gpu_that_is_not_there_is_named(run, monkeypatch):
    from parallax_core import cuda_kernels

    monkeypatch.setattr(cuda_kernels, "availability", lambda: "no NVIDIA GPU is visible")
    monkeypatch.setattr(study_module, "measure", refuse)
    status, _, err = run("study", "decode", "--device", "gpu")
    assert status == 2
    assert err == "parallax-core: --device: no NVIDIA GPU is visible\n"


def test_a_grid_that_the_device_lacks_is_named(run, tmp_path, monkeypatch):
    from parallax_core import cuda_kernels

    grid = tmp_path / "grid.yaml"
    grid.write_text(DECODE)
    monkeypatch.setattr(cuda_kernels, "availability", lambda: None)
    monkeypatch.setattr(study_module, "measure", refuse)
    status, _, err = run("study", "decode", "--config", grid)
    assert status == 2
    assert "--config: gpu: expected a grid" in err
    assert "--fa3: no file absent.so" in run("study", "decode", "--fa3", "absent.so")[2]


def refuse(point, shared):
    pytest.fail("bad input must be found before anything is computed")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workers", "0"], "'--workers'"),
        (["--workers", "many"], "'--workers'"),
        (["--workers", "2", "--engine", "local"], "--workers: expected with --engine ray only, got 2"),
        (["--engine", "dask"], "'--engine'"),
        (["--seed", "-1"], "'--seed'"),
        (["--config", "absent.yaml"], "--config absent.yaml: no file"),
        (["--data", "absent.safetensors"], "--data: no file absent.safetensors"),
        (["--data", __file__], "--data: .* is not a safetensors file"),
        (["--output", f"{__file__}/x"], "--output: .* is a file"),
        (["--outptu", "x"], "--outptu"),
    ],
)
def test_bad_input_of_a_study_is_one_line_that_names_the_argument(run, monkeypatch, arguments, message):
    monkeypatch.setattr(study_module, "evaluate", refuse)
    status, out, err = run("study", "regression", *arguments)
    assert status == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("parallax-core: ")
    assert re.search(message, line), line


def test_a_bad_key_of_the_configuration_is_named(run, config):
    config.write_text(SMALL.replace("replicates: 4", "replicates: none"))
    status, _, err = run("study", "regression", "--engine", "local", "--config", config)
    assert status == 2
    assert f"--config {config}: exponents.0.replicates: " in err
    assert "got 'none'" in err


def test_heads_that_the_data_lacks_are_named(run, config, tmp_path):
    config.write_text("real: {estimators: [lla], heads: [1], ridge: 0.1}")
    status, _, err = run(
        "study", "regression", "--engine", "local", "--config", config, "--output", tmp_path / "o"
    )
    assert status == 2
    assert "--config: real.heads: minilm_qkv_sample.safetensors has heads 0, 3, 6, 9, got 1" in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "lacks tensors q, k, v or NAME.q, NAME.k, NAME.v; it has none"),
        ({"a.q": random(1, 4, 2, 3), "a.k": random(1, 4, 2, 3)}, "lacks a.v; it has a.k, a.q"),
        (
            {"q": random(4, 3), "k": random(4, 3), "v": random(4, 3)},
            r"qkv.q: expected shape \(B, L, H, D\), got",
        ),
        ({"q": random(1, 4, 3, 3), "k": random(1, 4, 2, 3), "v": random(1, 4, 2, 3)}, "qkv.q: .* multiple"),
        (
            {"q": random(1, 4, 2, 3), "k": random(1, 4, 2, 3), "v": random(1, 5, 2, 3)},
            "qkv.v: expected shape",
        ),
        (
            {"q": random(1, 4, 2, 3), "k": random(1, 4, 2, 3) * np.inf, "v": random(1, 4, 2, 3)},
            "qkv.k: .* finite",
        ),
    ],
)
def test_a_file_without_the_tensors_is_refused(run, qkv, tensors, message):
    status, _, err = run("compare", qkv(**tensors))
    assert status == 2
    (line,) = err.splitlines()
    assert re.search("FILE: .*" + message, line), line


def test_compare_prints_the_errors_of_the_heads_asked_for(run, qkv, tmp_path):
    tensors = {f"deep.{part}": random(2, 10, 6, 4) for part in "qkv"}
    path = qkv({"heads": "1,2,4,8,9,11"}, **tensors)
    plot = tmp_path / "figure.svg"
    status, out, _ = run("compare", path, "--heads", "4,11", "--plot", plot)
    assert status == 0
    assert "deep, heads 4, 11" in out
    from parallax_core.compare import compare

    result = compare(*(tensors[f"deep.{part}"][:, :, [2, 5]] for part in "qkv"))
    for name, error in zip(result.estimators, result.leave_one_out):
        # The command computes in float64 what it read in float32, as this does.
        assert re.search(rf"{name}\s+{error:.3f}\s", out)
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--heads", "7"], "--heads: heads.safetensors has heads 0, 1, got 7"),
        (["--heads", "a"], "--heads: expected numbers"),
        (["--layer", "x"], "--layer: expected one of qkv, got 'x'"),
        (["--ridge", "-1"], "'--ridge'"),
        (["--plot", "figure.txt"], "--plot: expected a name ending in"),
        (["--plot", "/absent/figure.svg"], "--plot: expected an existing folder"),
    ],
)
def test_bad_input_of_compare_is_one_line(run, qkv, arguments, message):
    status, _, err = run(
        "compare", qkv(q=random(1, 4, 2, 3), k=random(1, 4, 2, 3), v=random(1, 4, 2, 3)), *arguments
    )
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_data_that_nothing_would_read_is_refused(run, config, qkv):
    path = qkv(q=random(1, 4, 2, 3), k=random(1, 4, 2, 3), v=random(1, 4, 2, 3))
    status, _, err = run("study", "regression", "--engine", "local", "--config", config, "--data", path)
    assert status == 2
    assert "--data: the configuration has no part 'real'" in err


def test_the_traceback_is_shown_only_on_request(run):
    assert "Traceback" not in run("compare", "absent")[2]
    assert "Traceback" in run("compare", "absent", "--debug")[2]


def test_info_says_why_a_backend_is_missing(run):
    from parallax_core import cuda_kernels

    status, out, _ = run("info")
    assert status == 0
    assert "CPU" in out
    reason = cuda_kernels.availability()
    assert reason is None or " ".join(reason.split()[:3]) in out


@pytest.mark.parametrize(
    "command", [[], ["study"], ["study", "regression"], ["study", "decode"], ["compare"], ["info"]]
)
def test_every_command_has_help(run, command):
    status, out, _ = run(*command, "--help")
    assert status == 0
    assert "Usage: parallax-core" in out


def test_without_typer_one_line_names_the_extra():
    code = "import sys; sys.modules['typer'] = None; from parallax_core.cli import main; main(['info'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "parallax-core: typer is not installed: pip install 'parallax-core[cli]'\n"


def test_the_entry_imports_nothing_heavy():
    code = (
        "import sys; import parallax_core.cli; "
        "print(*{'typer', 'rich', 'pydantic', 'matplotlib', 'ray', 'torch', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

"""The distribution as users get it: built, installed in an empty environment, and imported from there."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUBPACKAGES = ("parallax_core/cuda_kernels", "parallax_core/distributed", "parallax_core/reference")
IMPORT_EVERYTHING = """
import importlib, importlib.util, pkgutil
import parallax_core
names = ["parallax_core"]
for module in pkgutil.walk_packages(parallax_core.__path__, "parallax_core."):
    if not module.name.startswith("parallax_core.frameworks."):
        names.append(module.name)
# Where the folders are mapped by an editable install, walking finds only what lies under parallax_core.
names += ["parallax_core.cuda_kernels", "parallax_core.distributed"]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as missing:
        # What launches kernels is imported once an array on a GPU is passed, and CuPy is there then.
        launches = name.startswith(("parallax_core.cuda_kernels.", "parallax_core.gpu_exchange"))
        if not launches or missing.name.partition(".")[0] not in ("cupy", "cuda"):
            raise
for name in ("distributed", "cuda_kernels"):
    spec = importlib.util.find_spec(name)
    assert spec is None, f"{name} is importable at top level from {spec.origin}"
print(*sorted(set(names)), sep="\\n")
"""

pytestmark = pytest.mark.slow


def run(*command, cwd):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("source") / "parallax-core"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".hypothesis"
    )
    return shutil.copytree(ROOT, copy, ignore=ignored)


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, source, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An empty environment; its Python."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    return folder / "bin" / "python"


def data_files(folder):
    kinds = (".cu", ".cuh", ".yaml", ".safetensors", ".j2", ".typed")
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in kinds}


def test_wheel_and_sdist_hold_every_source_and_data_file(built, source):
    wheel, sdist = built
    names = set(zipfile.ZipFile(wheel).namelist())
    # The sdist is what the wheel is made of: it must bring the tests' inputs along too.
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for folder, package in (
        ("parallax_core", "parallax_core"),
        ("cuda_kernels", "parallax_core/cuda_kernels"),
        ("distributed", "parallax_core/distributed"),
    ):
        modules = {p.relative_to(source / folder).as_posix() for p in (source / folder).rglob("*.py")}
        for file in modules | data_files(source / folder):
            assert f"{package}/{file}" in names
            assert f"{folder}/{file}" in packed
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"parallax_core"}
    assert "setup.cfg" in packed


def test_wheel_in_an_empty_environment(built, environment, tmp_path):
    run(environment, "-m", "pip", "install", "--quiet", f"{built[0]}[ray]", cwd=tmp_path)
    imported = run(environment, "-c", IMPORT_EVERYTHING, cwd=tmp_path).split()
    for package in SUBPACKAGES:
        assert package.replace("/", ".") in imported
    assert len(imported) > 30
    command = environment.parent / "parallax-core"
    assert "study" in run(command, "--help", cwd=tmp_path)
    assert "numba" in run(command, "info", cwd=tmp_path).lower()


def test_checkout_imports_as_it_lies(source, environment):
    """With the checkout first on the path, as in its own folder and on Ray's workers."""
    origin = run(environment, "-c", "import parallax_core.distributed as d; print(d.__file__)", cwd=source)
    assert Path(origin.strip()) == source / "distributed" / "__init__.py"


def test_editable_install(source, environment, tmp_path):
    """After the wheel's test, whose dependencies it uses."""
    run(environment, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", source, cwd=tmp_path)
    run(environment, "-c", IMPORT_EVERYTHING, cwd=tmp_path)
    origin = run(environment, "-c", "import parallax_core.distributed as d; print(d.__file__)", cwd=tmp_path)
    assert Path(origin.strip()) == source / "distributed" / "__init__.py"

"""The CUDA compiler and its cache; NVRTC needs no GPU."""

import subprocess
import sys
import threading

import pytest

pytest.importorskip("cupy", reason="CuPy brings NVRTC's bindings; pip install '.[gpu-compile]'")

from parallax_core.cuda_kernels import compiler

KERNEL = """
#include "numbers.cuh"
extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR * N; }
"""
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spill(float* x) {
    float a[128];
    #pragma unroll
    for (int i = 0; i < 128; i++) a[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 128; i++) x[i * 1024 + threadIdx.x] = a[(7 * i + 3) % 128] * a[i];
}
"""
DEFINES = (("N", 3),)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of kernels in place of the package's, and an empty cache."""
    for name in ("include", "portable"):
        (tmp_path / name).mkdir()
    (tmp_path / "include" / "numbers.cuh").write_text("#define FACTOR 2.0f\n")
    (tmp_path / "portable" / "scale.cu").write_text(KERNEL)
    (tmp_path / "portable" / "spill.cu").write_text(SPILLING)
    monkeypatch.setattr(compiler, "FOLDER", tmp_path)
    monkeypatch.setenv("PARALLAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def compilations(monkeypatch):
    """The arguments of every compilation that took place."""
    calls = []
    compile_cubin = compiler.compile_cubin

    def counted(*arguments):
        calls.append(arguments)
        return compile_cubin(*arguments)

    monkeypatch.setattr(compiler, "compile_cubin", counted)
    return calls


def image(arch="sm_90", defines=DEFINES):
    return compiler._image("portable/scale.cu", defines, arch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a", "sm_100", "sm_120"])
def test_every_architecture_compiles_and_reports_what_it_uses(folder, arch):
    cubin, log = compiler.compile_cubin("portable/scale.cu", DEFINES, arch)
    assert cubin.startswith(b"\x7fELF")
    used = compiler.usage(log)["scale"]
    assert 4 <= used.registers <= 64
    assert used.spill_bytes == used.stack_bytes == 0
    # 128 floats a thread in the 64 registers that a block of 1024 threads leaves each.
    _, log = compiler.compile_cubin("portable/spill.cu", (), arch)
    assert compiler.usage(log)["spill"].spill_bytes >= 2 * 4 * 64


def test_the_cache_knows_source_headers_defines_and_architecture(folder, compilations):
    first = image()
    assert image() == first
    assert len(compilations) == 1
    assert image(defines=(("N", 4),)) != first
    assert image(arch="sm_80") != first
    (folder / "include" / "numbers.cuh").write_text("#define FACTOR 5.0f\n")
    edited = image()
    assert edited != first
    (folder / "include" / "unused.cuh").write_text("\n")
    assert image() == edited
    (folder / "portable" / "scale.cu").write_text(KERNEL.replace("*=", "+="))
    assert image() not in (first, edited)
    assert len(compilations) == 6


def test_damaged_entries_are_compiled_again(folder, compilations):
    good = image()
    (entry,) = (folder / "cache").iterdir()
    whole = entry.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole[:100] + b"\0" + whole[101:-1] + b"\1"):
        entry.write_bytes(damaged)
        assert image() == good
        assert entry.read_bytes() == whole
    assert len(compilations) == 5


def test_a_cache_that_cannot_be_written_to_is_no_error(folder, compilations, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("PARALLAX_CACHE_DIR", str(folder / "file" / "cache"))
    assert image() == image()
    assert len(compilations) == 2


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PARALLAX_CACHE_DIR", str(tmp_path / "own"))
    assert compiler.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PARALLAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiler.cache_folder() == tmp_path / "xdg" / "parallax-core"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / ".cache" / "parallax-core"


def test_writers_at_once_leave_one_whole_entry(folder):
    images = []
    threads = [threading.Thread(target=lambda: images.append(image())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (entry,) = (folder / "cache").iterdir()
    assert len(set(images)) == 1
    assert compiler._load(entry) == images[0]


def test_errors_name_the_source_its_macros_and_hold_the_log(folder):
    (folder / "portable" / "wrong.cu").write_text('extern "C" __global__ void f() { undeclared = N; }')
    with pytest.raises(compiler.CompilationError, match=r"(?s)portable/wrong.cu \(N=3\).*sm_90.*undeclared"):
        compiler.compile_cubin("portable/wrong.cu", DEFINES, "sm_90")


def test_the_architecture_follows_the_device_and_the_compiler():
    known = compiler.nvrtc.getSupportedArchs()
    assert compiler.architecture("portable/decode.cu", (8, 0)) == "sm_80"
    assert compiler.architecture("portable/decode.cu", (9, 0)) == "sm_90"
    assert compiler.architecture("sm90/decode.cu", (9, 0)) == "sm_90a"
    assert compiler.architecture("portable/decode.cu", (99, 0)) == f"compute_{max(known)}"


def test_a_virtual_architecture_gives_assembly_for_the_driver(folder):
    assert b".version" in compiler.compile_cubin("portable/scale.cu", DEFINES, "compute_80")[0]


def test_importing_the_package_imports_no_compiler():
    code = "import parallax_core, sys; assert 'cupy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

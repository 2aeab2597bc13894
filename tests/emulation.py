"""CUDA kernels on the host: compiled against ``tests/emulator``, and launched in place of the driver's.

A public call on arrays of the stand-in then goes its whole way, to the kernel that the heuristics choose.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from stand_in import stand_in

from parallax_core.cuda_kernels import compiler, early_launch, launch, tensor_map, workspace

HERE = Path(__file__).parent / "emulator"
LATE, EARLY, RANDOM_LATE, RANDOM_EARLY = range(4)
"""Threads forward, backward or in random order, and asynchronous work as late or as early as it may be."""

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ compiles the kernels for the host")

_CALLS = {
    "attend.cu": "attend_kernel(emulator::argument<Problem>(a[0]){maps})",
    "lla.cu": "lla_kernel(emulator::argument<lla::Call>(a[0]){maps})",
    "lla_two_pass.cu": "lla_kernel(emulator::argument<lla::Call>(a[0]){maps})",
}
_LAUNCH = """
#ifndef CLUSTER
#define CLUSTER 1
#endif
#if (SOLVERS > 1 || GATHERED) && CLUSTER == 1
#define AT_ONCE x * y * z
#elif TOGETHER
#define AT_ONCE x
#else
#define AT_ONCE CLUSTER
#endif
extern "C" const char* launch(void** a, int x, int y, int z, int threads, int shared_bytes, int order) {
  static auto& failure = *new std::string;
  emulator::kernel = [a] { CALL; };
  failure = emulator::launch({x, y, z}, threads, AT_ONCE, shared_bytes, order);
  return failure.c_str();
}
"""

_OPTIONS = (
    "-std=c++20", "-O2", "-fPIC", "-w", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fno-threadsafe-statics"
)  # fmt: skip
_WATCHED = *_OPTIONS, "-fsanitize=thread"
"""Of a kernel: its accesses are told to races.cpp."""


class EmulationError(RuntimeError):
    """A launch did not come to its end: a deadlock, a barrier that is misused, a race in shared memory."""


class Kernel:
    """What the launchers take for a compiled kernel; its function is itself."""

    def __init__(self, library: Path):
        self.launch = ctypes.CDLL(str(library)).launch
        self.launch.restype = ctypes.c_char_p
        self.launch.argtypes = [ctypes.c_void_p] + [ctypes.c_int] * 6
        self.function = self

    def set_shared_memory(self, size: int) -> None:
        pass


class Prepared:
    """The driver's part of a launch. order: how the next launches are run; kinds: those of the latest."""

    order = LATE
    kinds: ClassVar[deque[launch.Kind]] = deque(maxlen=8)

    def __init__(self, kernel, grid, threads, shared_bytes, kind):
        self.kernel, self.shape, self.kind = kernel, (*grid, threads, shared_bytes), kind

    def launch(self, stream, arguments):
        Prepared.kinds.append(self.kind)
        failure = self.kernel.launch(arguments, *self.shape, Prepared.order)
        if failure:
            raise EmulationError(failure.decode())


class Workspace:
    """Partial results that begin as NaN, counters that must be left zero, mail and parcels that are kept."""

    mail = parcels = np.zeros(0, np.uint64)

    def acquire(self, device, stream, needed):
        self.partials = np.full(needed.partial_bytes // 4 + 64, np.nan, np.float32)
        self.counters = np.zeros(needed.counters + 1, np.uint32)
        if 8 * self.mail.size < needed.mail_bytes:
            self.mail = np.zeros(-(-needed.mail_bytes // 8), np.uint64)
        if 8 * (self.parcels.size - 32) < needed.parcel_bytes:
            self.parcels = np.zeros(-(-needed.parcel_bytes // 8) + 32, np.uint64)
        # At 256 bytes, as memory of a GPU is.
        first, parcels = (-(-x.ctypes.data // 256) * 256 for x in (self.partials, self.parcels))
        return workspace.Slab(self.counters.ctypes.data, self.mail.ctypes.data, parcels, first, needed)


@contextmanager
def emulated(capability=(9, 0), multiprocessors=132):
    """Calls on the stand-in's arrays run the kernels themselves. Gives the workspace of the latest launch."""
    held = Workspace()
    with stand_in(capability, multiprocessors) as patch:
        patch.setattr(compiler, "kernel", lambda source, name, defines, device: _kernel(source, defines))
        patch.setattr(launch, "Prepared", Prepared)
        patch.setattr(early_launch, "supported", lambda capability: False)
        patch.setattr(workspace, "acquire", held.acquire)
        patch.setattr(tensor_map, "encode", _encode)
        yield held
        Prepared.order = LATE


def _encode(address, sizes, strides, heads, columns, box, runs) -> np.ndarray:
    """What ``emulator/ptx/copy.cuh`` reads of a tensor map."""
    assert address % 16 == 0
    assert all(2 * s % 16 == 0 for s in strides)
    words = np.zeros(tensor_map.BYTES // 8, np.int64)
    words[:11] = address, *sizes, *strides, heads, columns, box, runs
    return words.view(np.uint8)


@functools.cache
def _kernel(source: str, defines: compiler.Defines) -> Kernel:
    text = (compiler.FOLDER / source).read_text(encoding="utf-8")
    maps = ", emulator::argument<Maps>(a[1])" if source.startswith("sm90") else ""
    return compiled(text, _CALLS[Path(source).name].format(maps=maps), defines)


@functools.cache
def compiled(text: str, call: str, defines: compiler.Defines) -> Kernel:
    """A kernel of any source. call: the expression that calls it, with arguments from ``a``, a ``void**``."""
    sources = _sources()
    name = hashlib.sha256(repr((text, defines)).encode()).hexdigest()[:16]
    file, library = sources / f"{name}.cpp", sources / f"{name}.so"
    launch = _LAUNCH.replace("CALL", call)
    file.write_text(f'#include "cuda.h"\n{_for_host(text)}\n{launch}', encoding="utf-8")
    macros = [f"-D{name}={value}" for name, value in defines]
    _run(*_WATCHED, *macros, f"-I{sources}", str(file), "-c", "-o", str(library.with_suffix(".o")))
    objects = library.with_suffix(".o"), sources / "races.o", sources / "launch.o"
    _run(*map(str, objects), "-shared", "-o", str(library))
    return Kernel(library)


def _run(*arguments: str) -> None:
    run = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    if run.returncode:
        raise EmulationError(f"a kernel does not compile for the host:\n{run.stderr[:4000]}")


@functools.cache
def _sources() -> Path:
    """The kernels' headers, those of instructions replaced, and what they share; one folder a process."""
    folder = Path(tempfile.mkdtemp(prefix="parallax-emulator-"))
    include = compiler.FOLDER / "include"
    for header in include.rglob("*.cuh"):
        to = folder / header.relative_to(include)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(_for_host(header.read_text(encoding="utf-8")), encoding="utf-8")
    missing = {p.name for p in (include / "ptx").iterdir()} - {p.name for p in (HERE / "ptx").iterdir()}
    assert not missing, f"no emulation of {missing}"
    shutil.copytree(HERE, folder, dirs_exist_ok=True)
    owner = os.getpid()  # of a fork the folder is not
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    for name, *more in ("races", "-O3", "-march=native", "-fvisibility=hidden"), ("launch",):
        _run(*_OPTIONS, *more, str(folder / f"{name}.cpp"), "-c", "-o", str(folder / f"{name}.o"))
    _run(*_WATCHED, "-x", "c++-header", str(folder / "cuda.h"), "-o", str(folder / "cuda.h.gch"))
    return folder


def _for_host(text: str) -> str:
    """Shared memory is a block's, which C++ has no storage for."""
    dynamic = r"extern __shared__ (?:__align__\([^)]*\) )?([\w ]+) (\w+)\[\];"
    text = re.sub(dynamic, r"\1* \2 = reinterpret_cast<\1*>(emulator::block().shared);", text)
    return re.sub(r"__shared__ ([\w ]+) (\w+);", r"\1& \2 = emulator::variable<\1>(__COUNTER__);", text)

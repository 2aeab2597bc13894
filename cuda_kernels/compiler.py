"""CUDA C++ to kernels through NVRTC, with a cache on disk that knows every header.

CuPy's own cache hashes the source alone: after an edit of an included header it would run the old kernel. It
also compiles with ``-ftz=true``, under which subnormal numbers vanish. So its NVRTC is called directly.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import cupy
from cupy.cuda import driver, function, nvrtc, runtime

from parallax_core.errors import BackendUnavailableError

from . import capture

FOLDER = Path(__file__).parent
Defines = tuple[tuple[str, int | str], ...]

_lock = threading.Lock()
_kernels: dict[tuple, Kernel] = {}


class CompilationError(RuntimeError):
    """A kernel does not compile; the message holds the compiler's log."""


class Usage(NamedTuple):
    """What a compiled kernel needs of a multiprocessor.

    ``spill_bytes`` counts stores and loads; ``shared_bytes`` is what a block has beside what its launch asks
    for.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


class Kernel:
    """A loaded kernel. ``function``: its CUfunction as an integer, valid while this object lives."""

    __slots__ = ("_loaded", "_shared_bytes", "function")

    def __init__(self, image: bytes, name: str):
        module = function.Module()
        module.load(image)
        self._loaded = module.get_function(name)
        self.function: int = self._loaded.ptr
        self._shared_bytes = 0

    def set_shared_memory(self, size: int) -> None:
        """Let launches ask for up to ``size`` bytes of dynamic shared memory, also beyond 48 KiB."""
        with _lock:
            # Never less than another plan of the same kernel asked for.
            self._shared_bytes = max(size, self._shared_bytes)
            driver.funcSetAttribute(
                self.function, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self._shared_bytes
            )

    @property
    def attributes(self) -> dict[str, int]:
        """What a thread (registers, local_bytes) and a block (static shared_bytes, max_threads) may have."""
        return {name: driver.funcGetAttribute(code, self.function) for name, code in _ATTRIBUTES.items()}


_ATTRIBUTES = {
    "registers": driver.CU_FUNC_ATTRIBUTE_NUM_REGS,
    "local_bytes": driver.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
    "shared_bytes": driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
    "max_threads": driver.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
}


def kernel(source: str, name: str, defines: Defines, device: int) -> Kernel:
    """The kernel ``name`` of a source, compiled for a device and loaded there; the same object every time.

    source: path below ``cuda_kernels``, "sm90/decode.cu"; name: of an ``extern "C"`` kernel; defines:
    macros and their values. Raises CompilationError with the compiler's log, BackendUnavailableError without
    NVRTC.
    """
    key = source, name, defines, device
    found = _kernels.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _kernels:
            image = _image(source, defines, architecture(source, _capability(device)))
            previous = runtime.getDevice()
            # Also binds the device's context to a thread that has none yet.
            runtime.setDevice(device)
            try:
                with capture.relaxed():
                    _kernels[key] = Kernel(image, name)
            finally:
                runtime.setDevice(previous)
        return _kernels[key]


def architecture(source: str, capability: tuple[int, int]) -> str:
    """What to compile a source for: ``sm_90a`` where it needs Hopper's own instructions, native otherwise.

    For a device newer than NVRTC it is the newest virtual architecture, which the driver compiles further.
    """
    if source.startswith("sm90/"):
        return "sm_90a"
    wanted = 10 * capability[0] + capability[1]
    known = nvrtc.getSupportedArchs()
    return f"sm_{wanted}" if wanted in known else f"compute_{max(n for n in known if n <= wanted)}"


def compile_cubin(source: str, defines: Defines, arch: str) -> tuple[bytes, str]:
    """Compile a source for an architecture, "sm_90a"; needs no GPU. Returns the binary and ptxas's log.

    For a virtual architecture, "compute_90", the binary is PTX. Raises as :func:`kernel` does.
    """
    text = _read(source)
    try:
        program = nvrtc.createProgram(text, source, (), ())
    except (RuntimeError, OSError) as error:
        raise BackendUnavailableError(
            f"NVRTC, CUDA's run-time compiler, cannot be loaded ({error}); "
            "pip install 'parallax-core[cuda13]' (or [cuda12]) brings it"
        ) from error
    try:
        try:
            nvrtc.compileProgram(program, _options(defines, arch))
        except nvrtc.NVRTCError as error:
            macros = " ".join(f"{name}={value}" for name, value in defines)
            raise CompilationError(
                f"{source} ({macros}) does not compile for {arch}: {error}\n{nvrtc.getProgramLog(program)}"
            ) from error
        virtual = arch.startswith("compute_")
        image = nvrtc.getPTX(program) if virtual else nvrtc.getCUBIN(program)
        return image, nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def usage(log: str) -> dict[str, Usage]:
    """What each kernel of a log of :func:`compile_cubin` uses, by its name."""
    kernels = {}
    for entry in re.split(r"Compiling entry function ", log)[1:]:
        name = re.match(r"'([^']+)'", entry)[1]
        # Functions that were not inlined have properties of their own below the entry; all count.
        stack = max(map(int, re.findall(r"(\d+) bytes stack frame", entry)), default=0)
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", entry)))
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", entry)))
        kernels[name] = Usage(int(re.search(r"Used (\d+) registers", entry)[1]), stack, spills, shared)
    return kernels


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$PARALLAX_CACHE_DIR``, or ``parallax-core`` in the user's cache."""
    own = os.environ.get("PARALLAX_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parallax-core"


def _options(defines: Defines, arch: str) -> tuple[str, ...]:
    macros = tuple(f"-D{name}={value}" for name, value in defines)
    include = f"-I{FOLDER / 'include'}"
    # Of older versions a lambda of generic arguments is a host's unless it is told otherwise.
    return "-std=c++17", "-default-device", f"-arch={arch}", include, "--ptxas-options=-v", *macros


def _image(source: str, defines: Defines, arch: str) -> bytes:
    """The compiled source, from the cache where it holds it."""
    path = cache_folder() / f"{_fingerprint(source, defines, arch)}.cubin"
    image = _load(path)
    if image is None:
        image, _ = compile_cubin(source, defines, arch)
        _store(path, image)
    return image


def _fingerprint(source: str, defines: Defines, arch: str) -> str:
    """A hash of all that decides what the compiler makes of a source."""
    digest = hashlib.sha256()
    # The include folder's own place is no part of it: an installation that moves keeps its cache.
    options = [o for o in _options(defines, arch) if not o.startswith("-I")]
    parts = [source, _read(source), *options, str(nvrtc.getVersion())]
    include = FOLDER / "include"
    for header in sorted(p for p in include.rglob("*") if p.is_file()):
        parts += [header.relative_to(include).as_posix(), header.read_text(encoding="utf-8")]
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _load(path: Path) -> bytes | None:
    """What :func:`_store` wrote, or None where there is nothing whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    image = data[_DIGEST:]
    return image if image and hashlib.sha256(image).digest() == data[:_DIGEST] else None


def _store(path: Path, image: bytes) -> None:
    """Write a cache entry whole or not at all; a cache that cannot be written to only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(image).digest() + image)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


_DIGEST = hashlib.sha256().digest_size


def _read(source: str) -> str:
    return (FOLDER / source).read_text(encoding="utf-8")


def _capability(device: int) -> tuple[int, int]:
    return divmod(int(cupy.cuda.Device(device).compute_capability), 10)

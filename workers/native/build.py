"""Compiles the C++ kernels of this folder once per machine and loads them.

All `*.cpp` here become one shared library, cached under the hash of everything that decides what
comes out: sources, flags, compiler and CPU. The kernels use the OpenMP runtime that torch has
already loaded, by linking against that very file: with a second runtime in the process, two thread
pools would spin against each other.

A kernel file exports plain C functions; its Python wrapper declares them with `function` and passes
addresses from `pointer`:

    _scale = function("saqqara_scale", (c_void_p, c_int64, c_float, c_int))
    _scale(pointer(x, torch.bfloat16), x.numel(), 2.0, torch.get_num_threads())
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saqqara.configs.paths import cache_dir
from saqqara.workers.cgroups import usable_cores

logger = logging.getLogger(__name__)

_SOURCE_DIR = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
_CPU_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
_OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")
_COMPILE_TIMEOUT_SECONDS = 300


class NativeUnavailableError(RuntimeError):
    """This machine cannot build or run the kernels; the message is the reason."""


def unavailable_reason() -> str | None:
    """Why the kernels cannot be used here, or None if they are ready; the first call builds."""
    library_or_reason = _load_once()
    return library_or_reason if isinstance(library_or_reason, str) else None


def load_library() -> ctypes.CDLL:
    """The loaded kernels.

    Raises:
        NativeUnavailableError: with the reason, the same at every call.
    """
    library_or_reason = _load_once()
    if isinstance(library_or_reason, str):
        raise NativeUnavailableError(library_or_reason)
    return library_or_reason


def function(
    name: str, argument_types: Sequence[Any], result_type: Any = None
) -> Callable[..., Any]:
    """One exported kernel with its ctypes signature; it runs without holding the GIL.

    Raises:
        NativeUnavailableError: the kernels cannot be used here.
    """
    kernel = load_library()[name]
    kernel.argtypes = tuple(argument_types)
    kernel.restype = result_type
    return kernel


def pointer(tensor: Tensor, dtype: torch.dtype) -> int:
    """The address of a contiguous CPU tensor of `dtype`; the caller keeps it alive."""
    assert tensor.dtype == dtype, f"a kernel wants {dtype}, not {tensor.dtype}"
    assert tensor.device.type == "cpu", f"a kernel wants a CPU tensor, not {tensor.device}"
    assert tensor.is_contiguous(), f"a kernel wants a contiguous tensor, not {tensor.stride()}"
    return tensor.data_ptr()


@functools.cache
def _load_once() -> ctypes.CDLL | str:
    try:
        return ctypes.CDLL(str(_build()))
    except (NativeUnavailableError, OSError, ValueError) as error:  # ValueError: no cache folder
        return str(error)


def _build() -> Path:
    """The path of the compiled library; compiles unless the cache has it."""
    cpu_flags = _cpu_flags()
    missing = [feature for feature in _CPU_FEATURES if feature not in cpu_flags]
    if missing:
        raise NativeUnavailableError(f"this CPU lacks {', '.join(missing)}")
    openmp = _loaded_openmp()
    compiler = _compiler()
    version = _run([compiler, "--version"])
    sources = sorted(_SOURCE_DIR.glob("*.cpp"))
    digest = hashlib.sha256()
    for part in (version, " ".join(_FLAGS), " ".join(sorted(cpu_flags)), openmp.name):
        digest.update(part.encode() + b"\0")
    for path in (*sources, *sorted(_SOURCE_DIR.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    folder = cache_dir() / "native" / digest.hexdigest()[:16]
    target = folder / "libsaqqara_native.so"
    if not target.exists():
        _make(folder)
        logger.info("compiling our CPU kernels for this machine, once; about a minute")
        # Processes may race to build the same library: each works in a folder of its own, and
        # the last rename wins with identical contents.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(_compile(compiler, sources, openmp, Path(scratch)), target)
    return target


def _make(folder: Path) -> None:
    """Make a folder of the cache.

    Raises:
        NativeUnavailableError: it cannot be written; says what to set.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NativeUnavailableError(
            f"{folder} cannot be made ({error.strerror}); SAQQARA_CACHE names another cache folder"
        ) from error


def _compile(compiler: str, sources: Sequence[Path], openmp: Path, scratch: Path) -> Path:
    objects = [scratch / f"{source.stem}.o" for source in sources]
    commands = [
        [compiler, *_FLAGS, "-fPIC", "-fopenmp", "-c", str(source), "-o", str(output)]
        for source, output in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        list(pool.map(_run, commands))
    linked = scratch / "linked.so"
    # Without -fopenmp here: that would add the compiler's own OpenMP runtime.
    _run([compiler, "-shared", *map(str, objects), str(openmp), "-o", str(linked)])
    return linked


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++"):
        if name and (path := shutil.which(name)):
            return path
    raise NativeUnavailableError("no C++ compiler: neither $CXX, c++ nor g++ is on the path")


def _run(command: Sequence[str]) -> str:
    """The output of a command.

    Raises:
        NativeUnavailableError: it failed; with the first line of its complaint that says error.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailableError(
            f"{command[0]} took more than {_COMPILE_TIMEOUT_SECONDS} seconds"
        ) from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [f"exit status {error.returncode}"]
        line = next((line for line in lines if "error" in line), lines[-1])
        raise NativeUnavailableError(f"{command[0]} failed: {line}") from error
    return done.stdout


def _cpu_flags() -> frozenset[str]:
    """What the CPU can do, as Linux names it; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _loaded_openmp() -> Path:
    """The OpenMP runtime in this process, which torch brought."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(_OPENMP_NAMES):
            return path
    raise NativeUnavailableError("torch has loaded no OpenMP runtime of its own")

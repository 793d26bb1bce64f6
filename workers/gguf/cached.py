"""The safetensors folder of a GGUF file, made once in the cache."""

import hashlib
import logging
import os
import re
from functools import lru_cache
from pathlib import Path

from saqqara.configs.paths import cache_dir

from .file import MAGIC, GgufFile
from .folder_once import build_once
from .from_gguf import FILES, Conversion

logger = logging.getLogger(__name__)

_FORM = 1  # of what is written; another one makes every folder anew
_FIRST_BYTES = 16 << 20  # the header of most files
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file, or is called one."""
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def converted_folder(path: Path) -> Path:
    """The Hugging Face folder of a GGUF file, in `cache_dir()/models/gguf`.

    It is made by the first call on a machine, which takes seconds for each GB, and is keyed by the
    file's content: its size, its first 16 MiB and 64 blocks of the rest.

    Raises:
        ValueError: the file cannot be read or is not one that is read, or the cache has no room or
            cannot be written.
    """
    try:
        state = path.stat()
        key = _content_key(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"GGUF: cannot read {path}: {error.strerror}") from error
    # The name becomes a client's and a metric's: nothing but plain signs.
    name = f"{re.sub(r'[^A-Za-z0-9._-]', '_', path.stem)}-{key}"
    target = cache_dir() / "models" / "gguf" / name
    if all((target / file).is_file() for file in FILES):
        return target
    conversion = Conversion(GgufFile(path))

    def build(folder: Path) -> None:
        logger.info("dequantising %s into %s, once", path, target)
        conversion.write(folder, lambda line: logger.info("%s: %s", path.name, line))
        if path.stat().st_mtime_ns != state.st_mtime_ns or path.stat().st_size != state.st_size:
            raise ValueError(f"GGUF: {path} has changed while it was read; is it being written?")

    return build_once(target, FILES, build, conversion.num_bytes)


@lru_cache(maxsize=16)  # once for each state of a file, however often a process asks
def _content_key(path: Path, size: int, _mtime_ns: int) -> str:
    digest = hashlib.sha256(f"{_FORM} {size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(_FIRST_BYTES))
        for i in range(_SAMPLES):
            place = _FIRST_BYTES + (size - _FIRST_BYTES - _SAMPLE_BYTES) * i // (_SAMPLES - 1)
            if place >= _FIRST_BYTES:
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, place))
    return digest.hexdigest()[:16]

"""A short name for a model's weights: the same for a folder and its copy on another machine.

Weights are told by the headers of their safetensors files and by blocks of every tensor. That reads
12 KiB a tensor, some ten megabytes of a 140 GB checkpoint; weights that differ in other places only
are taken for the same.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

DIGEST_CHARACTERS = 32
_BLOCK_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def weights_digest(folder: Path) -> str:
    """A digest of all safetensors files of a folder: names, headers, and blocks of each tensor."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb", buffering=0) as opened:
            length = min(int.from_bytes(opened.read(8), "little"), _MAX_HEADER_BYTES)
            header = opened.read(length)
            digest.update(header)
            for start in _block_starts(header):
                opened.seek(8 + length + start)
                digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()[:DIGEST_CHARACTERS]


def _block_starts(header: bytes) -> Iterator[int]:
    """Where to look into the data: start, middle and end of each tensor."""
    try:
        tensors = json.loads(header).items()
        spans = [item["data_offsets"] for name, item in tensors if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # a broken file, which the engine refuses in its own words
    for start, stop in spans:
        last = max(start, stop - _BLOCK_BYTES)
        yield from dict.fromkeys((start, (start + last) // 2, last))

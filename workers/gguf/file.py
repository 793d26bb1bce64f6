"""A GGUF file, opened: its fields, and its tensors as they are stored.

The format: magic, version, counts, key-value pairs, descriptions of tensors, padding, numbers
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The header is read here in one pass:
`gguf`'s own reader checks no length against the file, so that a list that claims 2^60 numbers keeps
it busy for ever. What the numbers mean is left to `gguf`.
"""

import itertools
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Types of values: number -> letter of `struct`; text and lists are read by hand.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS[12] = "d"
_TEXT, _LIST = 8, 9
_MOST_DIMENSIONS = 4
_MOST_NESTED = 4
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file; `shape` is that of numpy, the last dimension is contiguous.

    `kind` is the name of its type (`F32`, `Q4_K`, ...), `start` and `num_bytes` its place.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class GgufFile:
    """A file whose header has been read; its numbers are mapped, not loaded.

    Attributes:
        path: the file.
        fields: by key, a number, a text, a bool, or a list of those.
        tensors: by name, in the file's order.

    Raises:
        ValueError: it is no GGUF file, it is of another version or byte order, it is one of several
            pieces, it ends too early, tensors overlap, or one is of a type that `gguf` does not
            know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"GGUF: {path} is not a GGUF file (it does not begin with 'GGUF')")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.fields, self.tensors = _Header(path, data).read()
                _check_whole(path, self.fields, self.tensors, len(data))

    def field(self, key: str) -> Any:
        """The value of a key.

        Raises:
            ValueError: there is none.
        """
        if key not in self.fields:
            raise ValueError(f"GGUF: it has no field {key!r}")
        return self.fields[key]

    def rows(self, tensor: StoredTensor) -> "np.ndarray":
        """The stored bytes of a tensor as uint8 [rows, bytes of a row]; one row for a vector."""
        import numpy as np

        stored = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.num_bytes,))
        return stored.reshape(math.prod(tensor.shape[:-1]), -1)


class _Header:
    """Reads a header from front to back."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = len(MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "in big-endian order" if swapped in _VERSIONS else f"of version {version}"
            raise ValueError(f"GGUF: {self._path} is {what}; versions 2 and 3, little-endian, are")
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        fields = {self._text(): self._value(self._number("I")) for _ in range(num_fields)}
        described = [self._tensor() for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"GGUF: general.alignment is {alignment!r}, not a number of bytes")
        start = -(-self._at // alignment) * alignment
        return fields, dict(_placed(described, start))

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            raise ValueError(f"GGUF: {self._path} ends within its header; is it a whole file?")
        self._at += size
        return taken

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _LIST or depth == _MOST_NESTED:
            raise ValueError(f"GGUF: {self._path} has a value of unknown type {kind}")
        item, count = self._number("I"), self._number("Q")
        if item in _NUMBERS:
            size = struct.calcsize(f"<{_NUMBERS[item]}")
            return list(struct.unpack(f"<{count}{_NUMBERS[item]}", self._take(count * size)))
        return [self._value(item, depth + 1) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset behind the header."""
        name = self._text()
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"GGUF: tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("I"), self._number("Q")


def _placed(
    described: list[tuple[str, tuple[int, ...], int, int]], start: int
) -> Iterator[tuple[str, StoredTensor]]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, shape, number, offset in described:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"GGUF: tensor {name!r} is of unknown type {number}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"GGUF: tensor {name!r} has rows of {shape[-1]}, no whole {kind.name}")
        num_bytes = math.prod(shape[:-1]) * (shape[-1] // block * block_bytes)
        yield name, StoredTensor(name, kind.name, shape, start + offset, num_bytes)


def _check_whole(
    path: Path, fields: dict[str, Any], tensors: dict[str, StoredTensor], size: int
) -> None:
    if (pieces := fields.get("split.count", 0)) > 1:
        raise ValueError(
            f"GGUF: {path} is one of {pieces} pieces; join them first: "
            "`llama-gguf-split --merge FIRST_PIECE OUTPUT`"
        )
    needed = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=0)
    if size < needed:
        raise ValueError(
            f"GGUF: {path} has {size:,} bytes and needs {needed:,}: it is cut off; fetch it again"
        )
    in_order = sorted(tensors.values(), key=lambda tensor: tensor.start)
    for first, second in itertools.pairwise(in_order):
        if first.start + first.num_bytes > second.start:
            raise ValueError(
                f"GGUF: tensors {first.name!r} and {second.name!r} of {path} overlap: it is "
                "damaged; fetch it again"
            )

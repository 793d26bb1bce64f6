"""One safetensors file, copied piece by piece to where its numbers belong, with progress.

The file is read, not mapped: pages of a mapped file count as the process's memory until it is
unmapped, and what a rank reads of a large checkpoint is soon more than the machine has.
"""

import json
import logging
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

_PIECE_BYTES = 4 << 20  # enough for a disk to be read at its speed
_LENGTH = struct.Struct("<Q")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MOST_ITEMSIZE = 4
_LOG_SECONDS = 4.0  # between lines about what has been read
_BAR_LENGTH = 20
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file


def piece_buffer(shapes: Iterable[tuple[int, ...]]) -> torch.Tensor:
    """Room for a piece of any tensor of these shapes, a row of it at least.

    One for all pieces: freed ones would leave holes between the weights that no other fits into.
    """
    widest = max((shape[1] for shape in shapes if len(shape) == 2), default=1)
    return torch.empty(max(_PIECE_BYTES, widest * _MOST_ITEMSIZE), dtype=torch.uint8)


class SafetensorsFile:
    """An open file.

    Args:
        path: the file.
        buffer: of `piece_buffer`, for tensors that are at most as wide as those it was made for.

    Raises:
        ValueError: it is not a safetensors file.
    """

    def __init__(self, path: Path, buffer: torch.Tensor) -> None:
        self.path = path
        self._buffer = buffer
        try:
            with safe_open(path, framework="pt", device="cpu"):  # checks the whole header
                pass
        except SafetensorError as error:
            raise ValueError(f"model: {path} is not a safetensors file: {error}") from error
        self._file = path.open("rb", buffering=0)
        (length,) = _LENGTH.unpack(self._file.read(_LENGTH.size))
        header = json.loads(self._file.read(length))
        numbers_start = _LENGTH.size + length
        self._entries = {
            name: _Entry(
                entry["dtype"], tuple(entry["shape"]), numbers_start + entry["data_offsets"][0]
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    @property
    def names(self) -> set[str]:
        """Names of its tensors."""
        return set(self._entries)

    def copy(
        self, out: torch.Tensor, name: str, shape: tuple[int, ...], rows: range, cols: range
    ) -> None:
        """Copy rows and columns of a tensor to `out`, on any device, cast to its dtype.

        No more of it lies in memory besides than the buffer holds.

        Raises:
            ValueError: there is no such tensor, it has another shape, or a dtype that is not read.
        """
        entry = self._checked(name, shape)
        dtype = _DTYPES[entry.dtype]
        width = shape[1] if len(shape) == 2 else 1
        row_bytes = width * dtype.itemsize
        into = out if len(shape) == 2 else out[:, None]
        across = slice(cols.start, cols.stop) if len(shape) == 2 else slice(None)
        step = max(self._buffer.numel() // row_bytes, 1)
        for first in range(rows.start, rows.stop, step):
            count = min(step, rows.stop - first)
            piece = self._buffer[: count * row_bytes]
            self._fill(piece, entry.start + first * row_bytes)
            place = first - rows.start
            into[place : place + count].copy_(piece.view(dtype).view(count, width)[:, across])

    def _checked(self, name: str, shape: tuple[int, ...]) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"model: tensor {name!r} is not in {self.path}")
        if entry.shape != shape:
            raise ValueError(
                f"model: tensor {name!r} in {self.path} has shape {list(entry.shape)}; "
                f"the config implies {list(shape)}"
            )
        if entry.dtype not in _DTYPES:
            raise ValueError(
                f"model: tensor {name!r} in {self.path} has dtype {entry.dtype}; only float32, "
                "bfloat16 and float16 checkpoints are read"
            )
        return entry

    def _fill(self, piece: torch.Tensor, offset: int) -> None:
        """Read so many bytes from a place in the file."""
        left = memoryview(piece.numpy().data)
        while left:
            count = os.preadv(self._file.fileno(), [left], offset)
            if count == 0:
                raise ValueError(f"model: {self.path} ends too early; is it still being written?")
            left, offset = left[count:], offset + count


class LoadProgress:
    """Logs a bar of how much has been read, every few seconds; `total_bytes` None: not known."""

    def __init__(self, total_bytes: int | None) -> None:
        self._total_bytes = total_bytes
        self._num_bytes = 0
        self._logged = time.monotonic()

    def note(self, part: torch.Tensor) -> None:
        """One more tensor, or this rank's part of it, is read."""
        self._num_bytes += part.numel() * part.element_size()
        now = time.monotonic()
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            logger.info("weights: %s", loaded_bar(self._num_bytes, self._total_bytes))


def loaded_bar(num_bytes: int, total_bytes: int | None) -> str:
    """How much is loaded, such as `[#####---------------] 4.2 of 16.9 GiB`."""
    if total_bytes is None:
        return f"{num_bytes / _GIB:.1f} GiB read so far"
    filled = min(_BAR_LENGTH * num_bytes // max(total_bytes, 1), _BAR_LENGTH)
    bar = "#" * filled + "-" * (_BAR_LENGTH - filled)
    return f"[{bar}] {num_bytes / _GIB:.1f} of {total_bytes / _GIB:.1f} GiB"

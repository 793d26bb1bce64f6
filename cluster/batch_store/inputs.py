"""The input of a batch: its lines, read with bounds, and what makes a whole file no input."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, BinaryIO

from saqqara.cluster.openai.batches import read_wrapper
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.requests import read_object
from saqqara.configs.schema import BatchLimits

from .records import LineError

MAX_ERRORS = 100  # of a file; whoever has more wants to see the first of them
MAX_ID_CHARS = 512
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class InputLine:
    """One request of an input; `number` counts all lines of the file from 1."""

    number: int
    custom_id: str
    url: str
    body: Mapping[str, Any]


def check_input(file: BinaryIO, url: str, limits: BatchLimits) -> tuple[int, tuple[LineError, ...]]:
    """How many requests a file has, and what is wrong with its lines; `()` if it is an input.

    What stands in the bodies is not looked at: it costs a line, not the file.
    """
    errors: list[LineError] = []
    seen: dict[bytes, int] = {}  # of each custom id, in few bytes however long it is
    num_lines = 0
    for number, raw in _raw_lines(file, limits.max_line_bytes):
        num_lines += 1
        if num_lines > limits.max_lines:
            message = f"the file has more than {limits.max_lines} lines (batches.max_lines)"
            errors.append(LineError("too_many_lines", message))
            break
        try:
            line = _read_line(number, raw, (url,), limits)
            key = sha256(line.custom_id.encode(errors="surrogatepass")).digest()[:16]
            if (first := seen.setdefault(key, number)) != number:
                message = f"custom_id {line.custom_id!r:.100} is already that of line {first}"
                raise ApiError(400, message, "custom_id", "duplicate_custom_id")
        except ApiError as error:
            code = error.code or "invalid_value"
            errors.append(LineError(code, str(error), number, error.param))
            if len(errors) >= MAX_ERRORS:
                break
    if not num_lines:
        errors.append(LineError("empty_file", "the file has no lines, so there is nothing to do"))
    return num_lines, tuple(errors)


def read_input(file: BinaryIO, limits: BatchLimits) -> Iterator[InputLine]:
    """The requests of a file that `check_input` has found nothing wrong with."""
    for number, raw in _raw_lines(file, limits.max_line_bytes):
        assert raw is not None, "the file was checked"
        data = read_object(raw, "the line")
        yield InputLine(number, data["custom_id"], data["url"], data["body"])


def _read_line(
    number: int, raw: bytes | None, urls: Collection[str], limits: BatchLimits
) -> InputLine:
    if raw is None:
        message = f"the line has more than {limits.max_line_bytes} bytes (batches.max_line_bytes)"
        raise ApiError(400, message, None, "line_too_long")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        message = f"the line is not UTF-8: byte {error.start + 1}"
        raise ApiError(400, message, None, "invalid_json_line") from None
    try:
        data = read_object(raw, "the line")
    except ApiError as error:
        raise ApiError(400, str(error), error.param, "invalid_json_line") from None
    custom_id, url, body = read_wrapper(data, urls)
    if not 0 < len(custom_id) <= MAX_ID_CHARS:
        message = f"custom_id must have 1 to {MAX_ID_CHARS} characters, not {len(custom_id)}"
        raise ApiError(400, message, "custom_id", "invalid_value")
    return InputLine(number, custom_id, url, body)


def _raw_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbers and bytes of the lines that are not blank; None for one that is too long.

    Of a line no more than the bound is in memory at once.
    """
    number = 0
    while raw := file.readline(max_bytes + 1):
        number += 1
        is_whole = len(raw) <= max_bytes or raw.endswith(b"\n")
        while not is_whole and (rest := file.readline(_CHUNK_BYTES)):
            is_whole = rest.endswith(b"\n")
        if len(raw) > max_bytes:
            yield number, None
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield number, raw

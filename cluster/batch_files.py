"""The files of a batch job: input lines, results that survive a kill, and what they were made with.

Beside `results.jsonl` stands `results.jsonl.job.json`, written before the first result: it says
which input, model, retention and sampling the results belong to, so that a resumed job cannot mix
results of different settings.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig

from .batch_input import BadLine, Row, RowParser
from .batch_output import Record
from .request import SamplingParams

# Settings of the engine that change what the answers are (retention and budget are added resolved).
ANSWER_SETTINGS = ("tokenizer", "load_format", "dtype", "seed", "max_model_len")


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What one pass over the input file tells: its hash and how many lines are not blank."""

    sha256: str
    num_rows: int


def scan_input(path: Path) -> InputSummary:
    """Hash the input and count its rows.

    Raises:
        ValueError: the file cannot be read.
    """
    digest, num_rows = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                num_rows += bool(line.strip())
    except OSError as error:
        raise ValueError(f"input: cannot read {path}: {error.strerror}") from None
    return InputSummary(digest.hexdigest(), num_rows)


def read_rows(path: Path, parser: RowParser) -> Iterator[Row | BadLine]:
    """Rows of the input in order, one at a time; blank lines are left out.

    Of lines with the same `custom_id` the first one counts.
    """
    first_line: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            row = _parse(parser, number, raw)
            if row.custom_id is not None and row.custom_id in first_line:
                first = first_line[row.custom_id]
                message = f"custom_id {row.custom_id!r} is already that of line {first}"
                row = BadLine(number, row.custom_id, row.url, message, "custom_id")
            elif row.custom_id is not None:
                first_line[row.custom_id] = number
            yield row


def _parse(parser: RowParser, number: int, raw: bytes) -> Row | BadLine:
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return BadLine(number, None, None, f"not UTF-8: byte {error.start + 1} of the line")
    return parser.parse(number, text)


def fingerprint(
    config: EngineConfig, sampling: SamplingParams, input_sha256: str, return_token_ids: bool
) -> dict[str, Any]:
    """Everything that the results depend on, as flat JSON values."""
    local = Path(config.model)
    retention = Retention.parse(config.retention, config.budget)
    settings: dict[str, Any] = {
        "input_sha256": input_sha256,
        "model": str(local.resolve()) if local.exists() else config.model,
        "return_token_ids": return_token_ids,
    }
    settings |= {name: getattr(config, name) for name in ANSWER_SETTINGS}
    settings |= {f"retention.{k}": v for k, v in retention.to_dict().items()}
    settings |= {f"sampling.{k}": v for k, v in sampling.model_dump().items()}
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # tuples as they will be read back
    return plain


class ResultFile:
    """The output of a job: appended to, one whole line per row, by one process at a time.

    Opening it cuts off a torn last line and finds the input lines that are already answered
    (`done`). With `overwrite` it starts anew.

    Raises:
        ValueError: the file belongs to a job with other settings or to none, or another process
            is writing it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.sidecar = path.with_name(path.name + ".job.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b")
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
            else:
                self._check_settings(settings)
            self.done = self._recover()
            write_json(self.sidecar, {"settings": dict(settings)})
        except BaseException:
            self._file.close()
            raise

    def write(self, record: Record) -> None:
        """Append one record and hand it to the operating system at once."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.done.add(int(record["line"]))

    def close(self) -> None:
        """Make sure everything is on disk, and let go of the file."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output: another job is writing {self.path}") from None

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:
            return
        if not self.sidecar.exists():
            raise ValueError(
                f"output: {self.path} exists and is not a batch job's (no {self.sidecar.name}); "
                "choose another file, or --overwrite it"
            )
        before: dict[str, Any] = json.loads(self.sidecar.read_text(encoding="utf-8"))["settings"]
        for key in sorted(before.keys() | settings.keys()):
            old, new = before.get(key), settings.get(key)
            if old != new:
                what = (
                    "the input file has changed"
                    if key == "input_sha256"
                    else (f"{key} was {old!r} and is now {new!r}")
                )
                raise ValueError(
                    f"output: {self.path} holds results of other settings: {what}; "
                    "repeat the old settings to resume, or start anew with --overwrite"
                )

    def _recover(self) -> set[int]:
        """Cut off a torn last line; the input lines that have a record."""
        self._file.seek(0)
        done: set[int] = set()
        end = 0
        for number, raw in enumerate(self._file, start=1):
            if not raw.endswith(b"\n"):
                break
            try:
                done.add(int(json.loads(raw)["line"]))
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"output: line {number} of {self.path} is no batch result; the file is "
                    "damaged, start anew with --overwrite"
                ) from None
            end += len(raw)
        self._file.truncate(end)
        return done


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file that is either there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)

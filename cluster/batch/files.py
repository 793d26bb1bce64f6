"""The results of a batch job: a file that survives a kill, and what its rows were made with.

Beside `results.jsonl` stands `results.jsonl.job.json`, written before the first result: it says
which input, model, retention and sampling the results belong to, so that a resumed job cannot mix
results of different settings.
"""

import fcntl
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Self

from saqqara.configs.json_text import json_text

from .fingerprint import difference
from .records import Record

FORMAT = 2  # of the settings beside the results


class WriteError(RuntimeError):
    """A file cannot be written; the message names it and says why."""


class ResultFile:
    """The output of a job: appended to, one whole line per row, by one process at a time.

    Opening it takes the file's lock, `resume` finds what is there, and `begin` comes before the
    first `write`.

    Args:
        path: the file.
        overwrite: `begin` starts the file anew; until then what was there stays.

    Attributes:
        done: input lines that have a record.
        num_errors: how many of those are error records.

    Raises:
        ValueError: the file cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path = path
        self.sidecar = path.with_name(path.name + ".job.json")
        self.done: set[int] = set()
        self.num_errors = 0
        self._overwrite = overwrite
        self._settings: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._file = self._open()
        try:
            self._lock()
        except BaseException:
            self._file.close()
            raise

    def resume(self, settings: Mapping[str, Any]) -> None:
        """Find the input lines that are already answered, and cut off a torn last line.

        Args:
            settings: what the job's results depend on.

        Raises:
            ValueError: the file belongs to a job with other settings, or to none.
        """
        self._settings = dict(settings)
        if not self._overwrite:
            self._check_settings()
            self._recover()

    def begin(self, resolved: Mapping[str, str]) -> None:
        """Start writing, now that the engine is up.

        Args:
            resolved: what is known once it is, see `resolved_settings`.

        Raises:
            ValueError: they have come to something else than for the results that are there.
        """
        before = self._before.get("resolved") or {}
        both = before.keys() & resolved.keys()
        changed = difference({k: before[k] for k in both}, {k: resolved[k] for k in both})
        if changed is not None:
            raise ValueError(
                f"output: {self.path} holds results of another model or machine: {changed}; set it "
                "as it was to resume, or start anew with --overwrite"
            )
        if self._overwrite:
            self._file.truncate(0)
        data = {"format": FORMAT, "settings": self._settings, "resolved": {**before, **resolved}}
        write_json(self.sidecar, data)

    def write(self, record: Record) -> None:
        """Append one record and hand it to the operating system at once.

        Raises:
            WriteError: the disk does not take it; what is there is whole lines.
        ValueError: the record is no JSON; nothing was written.
        """
        data = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        start = os.fstat(self._file.fileno()).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError as error:
            with suppress(OSError):  # else the next run cuts the torn line off
                self._file.truncate(start)
            raise _cannot_write(self.path, error, self._resume_hint()) from None
        self.done.add(int(record["line"]))
        self.num_errors += record["error"] is not None

    def sync(self) -> None:
        """Make sure everything is on disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error, self._resume_hint()) from None

    def close(self) -> None:
        """Make sure everything is on disk, and let go of the file."""
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except WriteError:
            if kind is None:  # else: that error came first
                raise

    def _resume_hint(self) -> str:
        return f"{len(self.done)} rows are there; the same command goes on from them"

    def _open(self) -> FileIO:
        if self.path.suffix == ".gz":
            raise ValueError(
                f"output: {self.path} cannot be packed: a killed job could not go on from it; "
                "leave .gz off and pack it afterwards"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not stat.S_ISREG(self.path.stat().st_mode):
                kind = "a folder" if self.path.is_dir() else "a pipe or a device"
                raise ValueError(f"output: {self.path} is {kind}; it must be a file")
            return FileIO(self.path, "a")
        except OSError as error:
            raise ValueError(f"output: cannot write {self.path}: {error.strerror}") from None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output: another job is writing {self.path}") from None
        except OSError as error:
            raise ValueError(
                f"output: cannot lock {self.path}: {error.strerror}; choose a folder whose file "
                "system has locks"
            ) from None

    def _check_settings(self) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:
            return
        self._before = self._read_sidecar()
        changed = difference(self._before["settings"], self._settings)
        if changed is not None:
            raise ValueError(
                f"output: {self.path} holds results of other settings: {changed}; "
                "repeat the old settings to resume, or start anew with --overwrite"
            )

    def _read_sidecar(self) -> dict[str, Any]:
        try:
            data = json.loads(self.sidecar.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"output: {self.path} exists and is not a batch job's (no {self.sidecar.name}); "
                "choose another file, or --overwrite it"
            ) from None
        except OSError as error:
            raise ValueError(f"output: cannot read {self.sidecar}: {error.strerror}") from None
        except ValueError:
            data = None
        if not isinstance(data, dict) or not isinstance(data.get("settings"), dict):
            raise ValueError(
                f"output: {self.sidecar} is damaged, so nothing says what {self.path} was made "
                "with; start anew with --overwrite, or choose another file"
            )
        if data.get("format") != FORMAT:
            raise ValueError(
                f"output: {self.path} was written by another version of Saqqara; finish it with "
                "that, start anew with --overwrite, or choose another file"
            )
        return data

    def _recover(self) -> None:
        """Find the input lines that have a record, and cut off a torn last line."""
        end = 0
        with self.path.open("rb") as written:
            for number, raw in enumerate(written, start=1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    record = json.loads(raw)
                    self.done.add(int(record["line"]))
                    self.num_errors += record["error"] is not None
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f"output: line {number} of {self.path} is no batch result; the file is "
                        "damaged, start anew with --overwrite"
                    ) from None
                end += len(raw)
        self._file.truncate(end)


def _cannot_write(path: Path, error: OSError, hint: str = "") -> WriteError:
    return WriteError(f"cannot write {path}: {error.strerror}" + (f"; {hint}" if hint else ""))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file that is either there as a whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json_text(data, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from None

"""The results of a batch job: a file that survives a kill, and what its rows were made with.

Beside `results.jsonl` stands `results.jsonl.job.json`, written before the first result: it says
which input, model, retention and sampling the results belong to, so that a resumed job cannot mix
results of different settings.
"""

import fcntl
import json
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Self

from saqqara.configs.json_text import json_text

from .fingerprint import differences, never_mixed, shown
from .records import Record
from .retried import replace_records, retried_path, whole_records
from .text import reason

logger = logging.getLogger(__name__)

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
        mix_settings: resume although the results that are there were made with other settings. The
            file beside the results says which.
        retry_errors: rows whose record is an error are not done.

    Attributes:
        done: input lines that have a record which stays.
        num_errors: how many of those are error records.

    Raises:
        ValueError: the file cannot be written, or another process is writing it.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool = False,
        *,
        mix_settings: bool = False,
        retry_errors: bool = False,
    ) -> None:
        self.path = path
        self.sidecar = path.with_name(path.name + ".job.json")
        self.done: set[int] = set()
        self.num_errors = 0
        self._overwrite = overwrite
        self._mix_settings = mix_settings
        self._retry_errors = retry_errors
        self._to_retry: set[int] = set()
        self._retried: FileIO | None = None
        self._mixed: list[dict[str, Any]] = []
        self._settings: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._made = missing_paths(path)
        self._file = self._open(path)
        try:
            self._lock()
        except BaseException:
            self._file.close()
            raise

    def resume(self, settings: Mapping[str, Any], num_lines: int | None = None) -> None:
        """Find the input lines that are already answered, and cut off a torn last line.

        Args:
            settings: what the job's results depend on.
            num_lines: lines of the input, to find records of none of them.

        Raises:
            ValueError: the file belongs to a job with other settings, or to none, or has not one
                record a row.
        """
        self._settings = dict(settings)
        if not self._overwrite:
            self._check_settings()
            self._recover(num_lines)
            if self._before:
                self._note_mixed(differences(self._before["settings"], self._settings))

    def begin(self, resolved: Mapping[str, str]) -> None:
        """Start writing, now that the engine is up.

        Args:
            resolved: what is known once it is, see `resolved_settings`.

        Raises:
            ValueError: they have come to something else than for the results that are there.
        """
        before = self._before.get("resolved") or {}
        both = before.keys() & resolved.keys()
        changed = differences({k: before[k] for k in both}, {k: resolved[k] for k in both})
        if changed and not self._mix_settings:
            raise ValueError(
                f"output: {self.path} holds results of another model or machine: {shown(changed)}; "
                "set it as it was to resume, start anew with --overwrite, or have both with "
                "--mix-settings"
            )
        self._note_mixed(changed)
        if self._overwrite:
            self._file.truncate(0)
            retried_path(self.path).unlink(missing_ok=True)
        self._made = []
        data = {"format": FORMAT, "settings": self._settings, "resolved": {**before, **resolved}}
        write_json(self.sidecar, data | ({"mixed": self._mixed} if self._mixed else {}))
        if self._to_retry:
            self._retried = self._open(retried_path(self.path))

    def write(self, record: Record) -> None:
        """Append one record and hand it to the operating system at once.

        Raises:
            WriteError: the disk does not take it; what is there is whole lines.
        ValueError: the record is no JSON; nothing was written.
        """
        data = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        line = int(record["line"])
        file = self._file
        if line in self._to_retry:
            assert self._retried is not None
            file = self._retried
        start = os.fstat(file.fileno()).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[file.write(view) or 0 :]
        except OSError as error:
            with suppress(OSError):  # else the next run cuts the torn line off
                file.truncate(start)
            raise _cannot_write(self.path, error, self._resume_hint()) from None
        self.done.add(line)
        self.num_errors += record["error"] is not None

    def sync(self) -> None:
        """Make sure everything is on disk."""
        try:
            for file in (self._file, self._retried):
                if file is not None:
                    os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error, self._resume_hint()) from None

    def close(self) -> None:
        """Make sure everything is on disk, records of retried rows in place, and let go of it.

        What was made for a job that never began, file and folders, is removed.
        """
        if self._file.closed:
            return
        remove_made(self._made)
        try:
            self.sync()
            if self._retried is not None:
                self._put_in_place()
        finally:
            self._file.close()
            if self._retried is not None:
                self._retried.close()

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

    def _put_in_place(self) -> None:
        """Let the records of retried rows replace the old ones, if there are any."""
        try:
            new = replace_records(self.path)
        except OSError as error:
            raise _cannot_write(self.path, error, self._resume_hint()) from None
        if new is not None:
            self._file.close()
            self._file = new

    def _note_mixed(self, changed: Sequence[str]) -> None:
        if not changed:
            return
        logger.warning("%s will mix settings: %s", self.path, shown(changed))
        rows_before = len(self.done) + len(self._to_retry)
        self._mixed.append({"rows_before": rows_before, "changed": list(changed)})

    def _open(self, path: Path) -> FileIO:
        if path.suffix == ".gz":
            raise ValueError(
                f"output: {path} cannot be packed: a killed job could not go on from it; "
                "leave .gz off and pack it afterwards"
            )
        try:
            if os.path.lexists(path.parent):
                os.stat(path.parent)  # says of a link to nothing more than `mkdir` does
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):
                kind = "a folder" if path.is_dir() else "a pipe or a device"
                raise ValueError(f"output: {path} is {kind}; it must be a file")
            return FileIO(path, "a")
        except OSError as error:
            raise ValueError(f"output: cannot write {path}: {reason(error)}") from None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                raise BlockingIOError  # another job has just replaced it
        except (BlockingIOError, FileNotFoundError):  # or has just removed it
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
        self._mixed = list(self._before.get("mixed") or ())
        check_settings(str(self.path), self._before["settings"], self._settings, self._mix_settings)

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
        except (ValueError, RecursionError):
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

    def _recover(self, num_lines: int | None) -> None:
        """Find the input lines that have a record, and cut off a torn last line."""
        self._put_in_place()
        end = 0
        for number, (record, span) in enumerate(whole_records(self.path), start=1):
            is_error, line, end = record["error"] is not None, record["line"], span[1]
            self._check_place(number, line, num_lines)
            (self._to_retry if is_error and self._retry_errors else self.done).add(line)
            self.num_errors += is_error and not self._retry_errors
        self._file.truncate(end)

    def _check_place(self, number: int, line: int, num_lines: int | None) -> None:
        """Refuse a record whose row has one already, or that is none of the input's."""
        problem = None
        if line in self.done or line in self._to_retry:
            problem = f"a second record of line {line} of the input; remove one of the two"
        elif line < 1 or (num_lines is not None and line > num_lines):
            problem = f"a record of line {line} of the input, which has {num_lines}; remove it"
        if problem is not None:
            raise ValueError(
                f"output: line {number} of {self.path} is {problem}, or start anew with --overwrite"
            )


def check_settings(
    output: str, before: Mapping[str, Any], now: Mapping[str, Any], mix_settings: bool
) -> None:
    """Refuse to resume with settings that change answers, and always with what is never mixed.

    Raises:
        ValueError: names the output and the differences.
    """
    changed = differences(before, now) if not mix_settings else never_mixed(before, now)
    if changed:
        mixing = "" if never_mixed(before, now) else ", or have both with --mix-settings"
        raise ValueError(
            f"output: {output} holds results of other settings: {shown(changed)}; repeat the old "
            f"settings to resume, {'' if mixing else 'or '}start anew with --overwrite{mixing}"
        )


def missing_paths(path: Path) -> list[Path]:
    """A path and the folders above it, from the path upwards, that are not there yet."""
    return [each for each in (path, *path.parents) if not os.path.lexists(each)]


def remove_made(paths: Sequence[Path]) -> None:
    """Remove what was made of `missing_paths`: an empty file and empty folders."""
    for path in paths:
        with suppress(OSError):  # somebody else uses it
            path.rmdir() if path.is_dir() else path.unlink()


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

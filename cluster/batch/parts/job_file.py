"""What an output folder was made with, and who may write to it."""

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from saqqara.cluster.batch.files import check_settings, missing_paths, remove_made
from saqqara.cluster.batch.fingerprint import differences, shown
from saqqara.cluster.batch.text import reason

from .folder import STAGING, SUMMARY, OutputFolder
from .storage import filesystem, is_local

logger = logging.getLogger(__name__)

FORMAT = 2  # 1 numbered parts in the order in which files were named
_NAME = "_job.json"
_LOCK = "_job.lock"
_RESOLVED = "_resolved.json"
_PART = re.compile(r"part-(\d{6,})\.(jsonl|parquet)")


@dataclass(slots=True)
class JobFile:
    """`_job.json`: settings, how the input was cut, and whether all of it is answered.

    Attributes:
        settings: what answers depend on.
        part_rows: see `cut`.
        mixed: settings that were changed on purpose, and how many parts were there then.
        finished: rows, answers and errors once every part is there.
    """

    settings: dict[str, Any]
    part_rows: int
    mixed: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[str, int] | None = None

    def write(self, folder: OutputFolder) -> None:
        """Write it into the folder."""
        data = {
            "format": FORMAT,
            "settings": self.settings,
            "part_rows": self.part_rows,
            "mixed": self.mixed,
            "finished": self.finished,
        }
        folder.write_json(_NAME, data)

    def go_on_with(self, settings: dict[str, Any], mix: bool, folder: OutputFolder) -> None:
        """Take over the settings of this run.

        Raises:
            ValueError: they change answers, and that was not asked for.
        """
        check_settings(folder.url, self.settings, settings, mix)
        if changed := differences(self.settings, settings):
            self.note_mixed(changed, folder)
            self.settings = settings

    def note_mixed(self, changed: list[str], folder: OutputFolder) -> None:
        """Note what is changed on purpose, and how many parts are there."""
        logger.warning("%s will mix settings: %s", folder.url, shown(changed))
        self.mixed.append({"parts_before": len(committed(folder)), "changed": changed})


def check_ours(folder: OutputFolder) -> None:
    """Make sure that a folder is a job's, or new, whatever the job is.

    Raises:
        ValueError: it is a file, or holds something else than a job.
    """
    fs, path = filesystem(folder.url)
    if fs.isfile(path):
        raise _is_a_file(folder)
    names = _names(folder)
    if _NAME not in names and any(name not in (_LOCK, STAGING) for name in names):
        raise ValueError(
            f"output: {folder.url} is not empty and not a batch job's (no {_NAME}); choose another "
            "folder"
        )


def read_job_file(folder: OutputFolder) -> JobFile | None:
    """What is known of a folder's job; None where there is none yet.

    Raises:
        ValueError: the folder is a file, or holds something else than a job.
    """
    check_ours(folder)
    data = folder.read_json(_NAME)
    if data is None:
        return None
    if data.get("format") != FORMAT:
        raise ValueError(
            f"output: {folder.url} was written by another version of Saqqara; finish it with that, "
            "start anew with --overwrite, or choose another folder"
        )
    return JobFile(data["settings"], data["part_rows"], data["mixed"], data["finished"])


def settle(folder: OutputFolder, resolved: dict[str, str], mix_settings: bool) -> None:
    """Note what `auto` has come to for the first engine; the others must come to the same.

    It reads and then writes, so replicas call it one after another.

    Raises:
        ValueError: they have not, and answers would be of two kinds.
    """
    before = folder.read_json(_RESOLVED) or {}
    both = before.keys() & resolved.keys()
    changed = differences({k: before[k] for k in both}, {k: resolved[k] for k in both})
    if changed and not mix_settings:
        raise ValueError(
            f"output: {folder.url} holds results of another model or machine: {shown(changed)}; "
            "set it as it was to resume, start anew with --overwrite, or have both with "
            "--mix-settings"
        )
    if changed:
        job_file = read_job_file(folder)
        assert job_file is not None, "a job writes it before its replicas start"
        job_file.note_mixed(changed, folder)
        job_file.write(folder)
    folder.write_json(_RESOLVED, {**before, **resolved})


def committed(folder: OutputFolder) -> set[int]:
    """Indices of the parts that are there."""
    return {index for index, kind in _parts(folder).values() if kind == folder.kind}


def _parts(folder: OutputFolder) -> dict[str, tuple[int, str]]:
    """Index and kind of each part that is there, by its name."""
    found = {name: _PART.fullmatch(name) for name in _names(folder)}
    return {name: (int(part[1]), part[2]) for name, part in found.items() if part}


def clear_staging(folder: OutputFolder) -> None:
    """Remove what killed runs have left unfinished."""
    fs, _ = filesystem(folder.url)
    staging = folder.path(STAGING)
    if fs.exists(staging):
        fs.rm(staging, recursive=True)


def clear_results(folder: OutputFolder) -> None:
    """Remove all results, and then what is known of them; files of others stay.

    Killed amid that, it leaves a job of which parts are to be made again.
    """
    fs, _ = filesystem(folder.url)
    with suppress(ValueError):  # what cannot be read says nothing of its parts either
        if (job_file := read_job_file(folder)) is not None:
            job_file.finished = None
            job_file.write(folder)
    names = _names(folder)
    for name in (*_parts(folder), SUMMARY, _RESOLVED, _NAME):
        if name in names:
            fs.rm(folder.path(name))


@contextmanager
def only_writer(folder: OutputFolder) -> Iterator[None]:
    """Keep other jobs of this machine away from a folder; a cloud's folder has no lock.

    Raises:
        ValueError: another job is writing to it, or it cannot be made.
    """
    fs, path = filesystem(folder.url)
    with ExitStack() as stack:
        if is_local(fs):
            made = missing_paths(Path(path))
            stack.enter_context(_locked(folder, path))
            stack.callback(_remove_unused, folder, made)
        yield


def _remove_unused(folder: OutputFolder, made: list[Path]) -> None:
    """Remove a folder that was made for a job that never began."""
    if made and _names(folder) == [_LOCK]:
        remove_made([Path(folder.path(_LOCK)), *made])


def _locked(folder: OutputFolder, path: str) -> IO[str]:
    try:
        os.makedirs(path, exist_ok=True)
        lock = open(folder.path(_LOCK), "a")  # noqa: SIM115 - closed by the caller
    except FileExistsError:
        if os.path.isfile(path):
            raise _is_a_file(folder) from None
        raise ValueError(
            f"output: {folder.url} is a link, or a loop of links, to nothing"
        ) from None
    except OSError as error:
        raise ValueError(f"output: cannot write {folder.url}: {reason(error)}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            raise ValueError(f"output: another job is writing {folder.url}") from None
        raise ValueError(f"output: cannot lock {folder.url}: {error.strerror}") from None
    return lock


def _is_a_file(folder: OutputFolder) -> ValueError:
    return ValueError(
        f"output: {folder.url} is a file; several files, replicas or Parquet come out as a folder, "
        "so name a new one"
    )


def _names(folder: OutputFolder) -> list[str]:
    fs, path = filesystem(folder.url)
    if not fs.isdir(path):
        return []
    fs.invalidate_cache()
    return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))

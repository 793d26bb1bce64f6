"""Batch jobs over many files: cut into parts, answered by replicas, committed part by part.

A row is told by its file and line, whatever part or replica it comes to, and so is its noise. The
driver holds a few numbers for each part (of those that are retried, the lines of their errors),
never a row.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from saqqara.cluster.batch.answers import AnswerSettings
from saqqara.cluster.batch.fingerprint import fingerprint
from saqqara.cluster.batch.progress import BatchProgress
from saqqara.cluster.batch.stop import Stopped, StopSignals
from saqqara.cluster.batch.summary import BatchSummary, cost_of, integrity_of
from saqqara.cluster.engine.client import EngineClient
from saqqara.cluster.engine.report import EngineReport
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.long_wait import LongWait

from .cutting import Part, cut
from .folder import Kind, OutputFolder
from .job_file import (
    JobFile,
    check_ours,
    clear_results,
    clear_staging,
    committed,
    is_begun,
    only_writer,
    read_job_file,
)
from .pool import LocalPool, Over, Pool, Tally
from .replica import MakeClient, PartWork, ReplicaSettings
from .storage import InputFile, filesystem, find_inputs, whole_url
from .totals import combined

logger = logging.getLogger(__name__)

PART_ROWS = 1000
_TURN_SECONDS = 0.25
_NAMED_PARTS = 5  # in an error


@dataclass(frozen=True, slots=True)
class PartsJob:
    """What to run.

    Args:
        inputs: paths, URLs and glob patterns of JSON lines (with gzip or not) and Parquet.
        output: a folder, by path or URL; resumed if it holds this job.
        answers: what answers come from.
        output_kind: what the folder's files are.
        num_replicas: engines; one runs where its settings say, several run on Ray.
        part_rows: rows that are committed at once; a resumed job keeps to its first value.
        prompt_column: column of Parquet files with the prompts, if it is named otherwise.
        overwrite: start anew, once settings and input are checked.
        mix_settings, retry_errors, gpu_hour_price: see `BatchJob`.
    """

    inputs: tuple[str, ...]
    output: str
    answers: AnswerSettings
    output_kind: Kind = "jsonl"
    num_replicas: int = 1
    part_rows: int = PART_ROWS
    prompt_column: str | None = None
    overwrite: bool = False
    mix_settings: bool = False
    retry_errors: bool = False
    gpu_hour_price: float | None = None


@dataclass(frozen=True, slots=True)
class _Todo:
    """What is left of a job, and what an earlier run has done of it."""

    works: list[PartWork]
    num_rows: int
    resumed: int
    resumed_errors: int


def run_parts(
    job: PartsJob, client: EngineClient | None = None, make_client: MakeClient | None = None
) -> BatchSummary:
    """Run a job to its end.

    Args:
        job: what to run.
        client: the engine of the one replica, which is shut down at the end.
        make_client: makes the engine of a replica, in its process; default: as the settings say.

    Raises:
        ValueError: a file or setting is wrong; nothing has run then, except that the input was
            changed meanwhile.
        EngineDeadError: an engine failed; parts that were finished are in the folder.
        WriteError: the records cannot be written.
        Stopped: a signal came; parts that were finished are in the folder.
    """
    if job.answers.config.metrics_port is not None and job.num_replicas > 1:
        raise ValueError("metrics_port: several replicas cannot share a port; Ray exports theirs")
    if job.output.endswith((".jsonl", ".json", ".gz", ".parquet")):
        raise ValueError(
            f"output: {job.output} looks like a file; several files, replicas or Parquet come out "
            "as a folder, so name one"
        )
    folder = OutputFolder(whole_url(job.output), job.output_kind)
    files = find_inputs(job.inputs)
    _check_apart(folder, files)
    with StopSignals() as stop, only_writer(folder):
        check_ours(folder)
        job_file = None if job.overwrite else read_job_file(folder)
        todo = _prepare(job, folder, files, job_file)
        run = _Run()
        if todo.works:
            run = _run(job, folder, todo, stop, client, make_client)
        elif todo.num_rows == 0:
            logger.warning("the input has no rows")
    return _summary(job, todo, run)


def _prepare(
    job: PartsJob, folder: OutputFolder, files: Sequence[InputFile], job_file: JobFile | None
) -> _Todo:
    """Cut the input, compare the settings, and see what is left."""
    if job_file is not None and not is_begun(folder, job_file):
        clear_results(folder)  # whatever it was made with has made nothing
        job_file = None
    part_rows = job.part_rows if job_file is None else job_file.part_rows
    with LongWait(f"reading {len(files)} files"):
        parts, digests = cut(files, part_rows, job.prompt_column)
    with LongWait(f"reading {job.answers.config.model}"):
        settings = _settings(job, digests)
    num_rows = sum(part.num_rows for part in parts)
    if job_file is None:
        if job.overwrite:
            clear_results(folder)
        job_file = JobFile(settings, part_rows)
    else:
        job_file.go_on_with(settings, job.mix_settings, folder)
    finished = job_file.finished
    if {part.index for part in parts} - committed(folder):
        finished = None  # somebody has removed a part
    if finished is not None and not (job.retry_errors and finished["errors"]):
        return _Todo([], num_rows, num_rows, finished["errors"])
    clear_staging(folder)
    todo = _left(parts, num_rows, committed(folder), folder, job.retry_errors)
    job_file.finished = None
    if not todo.works:
        job_file.finished = {"rows": num_rows, "errors": todo.resumed_errors}
    job_file.write(folder)
    return todo


def _settings(job: PartsJob, digests: dict[str, str]) -> dict[str, Any]:
    written = {
        **job.answers.written(),
        "output_format": job.output_kind,
        "prompt_column": job.prompt_column,
        **{f"input/{label}": digest for label, digest in digests.items()},
    }
    return fingerprint(job.answers.config, job.answers.sampling, "", **written)


def _left(
    parts: Sequence[Part], num_rows: int, there: set[int], folder: OutputFolder, retry: bool
) -> _Todo:
    """Parts without records and, on `retry`, those with errors."""
    works: list[PartWork] = []
    resumed = resumed_errors = 0
    with LongWait("reading what is there"):
        for part in parts:
            if part.index not in there:
                works.append(PartWork(part))
                continue
            failed = _failed(part, folder)
            if retry and failed:
                works.append(PartWork(part, failed))
                resumed += part.num_rows - len(failed)
            else:
                resumed += part.num_rows
                resumed_errors += len(failed)
    return _Todo(works, num_rows, resumed, resumed_errors)


def _failed(part: Part, folder: OutputFolder) -> frozenset[int]:
    """Lines whose records are errors, of a part that is there and has one record a row."""
    lines: set[int] = set()
    failed: set[int] = set()
    problem = None
    number = 0
    try:
        for number, record in enumerate(folder.records(part.index), start=1):
            line = int(record["line"])
            if line in lines or number > part.num_rows:
                problem = f"record {number} is one too many, of line {line} of {part.label}"
            lines.add(line)
            if record["error"] is not None:
                failed.add(line)
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = f"what comes after {number} records is no batch result"
    if problem is None and len(lines) < part.num_rows:
        problem = f"it has {len(lines)} records of {part.num_rows} rows"
    if problem is not None:
        raise ValueError(
            f"output: {folder.name(part.index)} in {folder.url} was changed: {problem}; remove the "
            "file, and it is made again"
        )
    return frozenset(failed)


@dataclass(frozen=True, slots=True)
class _Run:
    """What came of the parts that were run; the defaults stand for none."""

    answered: int = 0
    errors: int = 0
    wall_seconds: float = 0.0
    start_seconds: float = 0.0
    report: EngineReport | None = None


def _run(
    job: PartsJob,
    folder: OutputFolder,
    todo: _Todo,
    stop: StopSignals,
    client: EngineClient | None,
    make_client: MakeClient | None,
) -> _Run:
    """Start the replicas, run what is left, and note that the job is finished."""
    if todo.resumed:
        logger.info("%s has %d of %d rows", job.output, todo.resumed, todo.num_rows)
    progress = BatchProgress(todo.num_rows, todo.resumed)
    started = time.perf_counter()
    done = Tally()
    settings = ReplicaSettings(job.answers, folder, job.prompt_column, job.mix_settings)
    try:
        pool = _pool(job, settings, client, make_client)
        stop.listen()
        with stop.deferred(), ExitStack() as stack:
            stack.callback(pool.close)
            stack.enter_context(progress)
            pool.begin(todo.works)
            _watch(pool, todo.works, done, progress, stop)
            seconds = time.perf_counter() - started
    except Stopped:
        logger.warning(
            "stopped by %s: %d of %d rows are in %s; run the same command again to go on from "
            "there",
            stop.name,
            todo.resumed + _rows_there(todo.works, done, folder),
            todo.num_rows,
            job.output,
        )
        raise
    job_file = read_job_file(folder)
    assert job_file is not None
    answered, errors = done.totals()
    job_file.finished = {"rows": todo.num_rows, "errors": errors + todo.resumed_errors}
    job_file.write(folder)
    clear_staging(folder)
    report = combined(list(done.reports.values()))
    start_seconds = min(pool.start_seconds, seconds)
    return _Run(answered, errors, seconds - start_seconds, start_seconds, report)


def _pool(
    job: PartsJob,
    settings: ReplicaSettings,
    client: EngineClient | None,
    make_client: MakeClient | None,
) -> Pool:
    if job.num_replicas == 1:
        return LocalPool(settings, client, make_client)
    from .ray_pool import RayPool

    return RayPool(settings, job.num_replicas, make_client)


def _watch(
    pool: Pool, works: Sequence[PartWork], done: Tally, progress: BatchProgress, stop: StopSignals
) -> None:
    """Show how far all replicas are until every part is committed; `done` is told of each.

    Raises:
        Stopped: a signal came.
        EngineDeadError: the replicas have ended before that.
        Exception: whatever a replica failed with.
    """
    while len(done.parts) < len(works):
        stop.check()
        event = pool.next(_TURN_SECONDS)
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Over):
            raise EngineDeadError(
                _missing([w.part for w in works if w.part.index not in done.parts])
            )
        if event is not None:
            done.note(event.replica, event.counts, event.report)
        if progress.is_due() or len(done.parts) == len(works):
            _show(progress, done.over(pool.tally()))


def _missing(parts: Sequence[Part]) -> str:
    named = [f"{part.label} from line {part.first_line}" for part in parts[:_NAMED_PARTS]]
    if len(parts) > len(named):
        named.append(f"{len(parts) - len(named)} more")
    return (
        f"the replicas have ended without an error and without {len(parts)} parts "
        f"({', '.join(named)}); run the same command again to go on from there"
    )


def _show(progress: BatchProgress, tally: Tally) -> None:
    progress.answered, progress.errors = tally.totals()
    report = combined(list(tally.reports.values()))
    if report is None:
        progress.tell("the engines are starting")
    else:
        progress.show(report)


def _rows_there(works: Sequence[PartWork], done: Tally, folder: OutputFolder) -> int:
    """Rows that this run has committed; the replicas may not have come to telling of all."""
    there = committed(folder)
    return sum(
        len(work.retried) or work.part.num_rows
        for work in works
        if work.part.index in (done.parts if work.retried else there)
    )


def _check_apart(folder: OutputFolder, files: Sequence[InputFile]) -> None:
    """Refuse an output folder that a pattern of the input could find results in."""
    above = folder.path("")
    for file in files:
        if filesystem(whole_url(file.url))[1].startswith(above):
            raise ValueError(
                f"output: the input {file.url} lies in {folder.url}; choose another folder"
            )


def _summary(job: PartsJob, todo: _Todo, run: _Run) -> BatchSummary:
    config, report = job.answers.config, run.report
    return BatchSummary(
        input=", ".join(job.inputs),
        output=job.output,
        model=config.model,
        retention=str(job.answers.retention.method),
        budget=config.budget,
        rows=todo.num_rows,
        answered=run.answered,
        errors=run.errors,
        resumed=todo.resumed,
        resumed_errors=todo.resumed_errors,
        wall_seconds=run.wall_seconds,
        start_seconds=run.start_seconds,
        integrity=integrity_of(report, config.check_integrity) if report else None,
        report=report,
        num_replicas=job.num_replicas,
        cost=cost_of(job.gpu_hour_price, report, run.start_seconds + run.wall_seconds),
    )

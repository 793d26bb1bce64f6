"""Batch inference over files: JSONL in, JSONL out, nothing lost and nothing twice.

Run it as `saqqara batch`, alone or inside `ray job submit`. Rows stream from the input with a
bounded number in flight, and every result is on disk as soon as the engine has finished it. The
same command after a kill goes on where the last one stopped.
"""

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saqqara.cluster.engine.client import EngineClient
from saqqara.cluster.engine.report import EngineReport
from saqqara.cluster.launch import launch_lasting
from saqqara.cluster.long_wait import LongWait
from saqqara.cluster.sampling import SamplingParams
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig

from .answers import AnswerSettings, RowLoop, final_report
from .files import ResultFile
from .fingerprint import fingerprint, resolved_settings
from .progress import BatchProgress
from .records import Record
from .source import BatchSource, InputSummary
from .stop import Stopped, StopSignals
from .summary import BatchSummary, cost_of, integrity_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What to run: files, engine, and the settings of lines that bring none of their own.

    Args:
        input: JSONL of simple or OpenAI batch lines, see `lines`.
        output: JSONL of results, see `records`; appended to when the job is resumed.
        config: the engine.
        sampling: sampling of lines without their own.
        return_token_ids: also write the token ids of each answer.
        max_in_flight: rows that the engine has at once; default: twice its slots.
        overwrite: start anew instead of resuming, once the engine is up.
        served_model_name: a name for OpenAI lines and their records, besides the model's own.
        ignore_model: OpenAI lines may give any name.
        mix_settings: resume although answers were made with other settings.
        retry_errors: run rows again whose record is an error; the new record replaces the old one.
        gpu_hour_price: what an hour of one GPU costs, for the cost in the summary.
    """

    input: Path
    output: Path
    config: EngineConfig
    sampling: SamplingParams
    return_token_ids: bool = False
    max_in_flight: int | None = None
    overwrite: bool = False
    served_model_name: str | None = None
    ignore_model: bool = False
    mix_settings: bool = False
    retry_errors: bool = False
    gpu_hour_price: float | None = None

    @property
    def answers(self) -> AnswerSettings:
        """What its answers come from."""
        return AnswerSettings(
            config=self.config,
            sampling=self.sampling,
            return_token_ids=self.return_token_ids,
            served_model_name=self.served_model_name,
            ignore_model=self.ignore_model,
            max_in_flight=self.max_in_flight,
        )


def run_batch(job: BatchJob, client: EngineClient | None = None) -> BatchSummary:
    """Run a job to its end; an engine is started unless `client` brings one.

    Raises:
        ValueError: a file or setting is wrong; nothing has run then, except that the input was
            changed meanwhile.
        EngineDeadError: the engine failed; what was answered is on disk.
        WriteError: the results cannot be written.
        Stopped: a signal came; what was answered is on disk.
    """
    with (
        StopSignals() as stop,
        BatchSource(job.input) as source,
        _open_results(job, source) as results,
    ):
        with LongWait(f"reading {source.name}"):
            found = source.scan(job.output.parent)
        with LongWait(f"reading {job.config.model}"):
            results.resume(_fingerprint(job, found), found.num_lines)
        resumed, resumed_errors = len(results.done), results.num_errors
        progress = BatchProgress(found.num_rows, resumed)
        run = _Run()
        if resumed < found.num_rows:
            if resumed:
                logger.info("%s has %d of %d rows", job.output, resumed, found.num_rows)
            run = _run_rows(job, source, results, progress, client, stop)
        elif found.num_rows == 0:
            logger.warning("%s has no rows", source.name)
            results.begin({})
    report = run.report
    return BatchSummary(
        input=str(job.input),
        output=str(job.output),
        model=job.config.model,
        retention=str(Retention.parse(job.config.retention, job.config.budget).method),
        budget=job.config.budget,
        rows=found.num_rows,
        answered=progress.answered,
        errors=progress.errors,
        resumed=resumed,
        resumed_errors=resumed_errors,
        wall_seconds=run.wall_seconds,
        start_seconds=run.start_seconds,
        integrity=integrity_of(report, job.config.check_integrity) if report else None,
        report=report,
        cost=cost_of(job.gpu_hour_price, report, run.start_seconds + run.wall_seconds),
    )


def _open_results(job: BatchJob, source: BatchSource) -> ResultFile:
    if source.is_same_file(job.output):
        raise ValueError(f"output: {job.output} is the input; choose another file")
    return ResultFile(
        job.output,
        job.overwrite,
        mix_settings=job.mix_settings,
        retry_errors=job.retry_errors,
    )


def _fingerprint(job: BatchJob, found: InputSummary) -> dict[str, Any]:
    return fingerprint(job.config, job.sampling, found.sha256, **job.answers.written())


@dataclass(frozen=True, slots=True)
class _Run:
    """Times and measurements of the rows that were run; the defaults stand for none."""

    wall_seconds: float = 0.0
    start_seconds: float = 0.0
    report: EngineReport | None = None


def _run_rows(
    job: BatchJob,
    source: BatchSource,
    results: ResultFile,
    progress: BatchProgress,
    client: EngineClient | None,
    stop: StopSignals,
) -> _Run:
    """Start an engine if there is none, and run the rows that have no record yet.

    Raises:
        Stopped: a signal came; what is finished is on disk, and a line says how to go on.
    """
    start = time.perf_counter()
    own = None if client is not None else _start(job, progress, stop)
    with stop.deferred(), ExitStack() as stack:
        client = client or own
        assert client is not None
        if own is not None:
            stack.callback(own.shutdown)
        else:
            client.reset_stats()
        results.begin(resolved_settings(job.config, client.describe().workers))
        started = time.perf_counter()
        stack.enter_context(progress)
        rows = (r for r in source.rows(job.answers.parser()) if r.line not in results.done)
        _row_loop(job, client, results, progress, stop).run(rows)
        if stop.received is not None and not progress.is_complete:
            results.sync()
            _tell_how_to_go_on(job, progress, stop)  # before the engine's end, which takes a while
            stop.check()
        wall_seconds = time.perf_counter() - started
        report = final_report(client)
        progress.show(report)
        return _Run(wall_seconds, started - start, report)


def _row_loop(
    job: BatchJob,
    client: EngineClient,
    results: ResultFile,
    progress: BatchProgress,
    stop: StopSignals,
) -> RowLoop:
    """The loop that writes to the results and shows how far it is."""

    def write(record: Record) -> None:
        results.write(record)
        progress.count(record)

    def tick(is_last: bool) -> None:
        progress.note(client, force=is_last)
        if progress.is_due():
            progress.show(client.report())

    return RowLoop(client, job.answers, write, tick, lambda: stop.received is not None)


def _start(job: BatchJob, progress: BatchProgress, stop: StopSignals) -> EngineClient:
    """Start the job's engine; a signal ends that at once."""
    try:
        client = launch_lasting(job.config)
        stop.listen()
        try:
            stop.check()
        except Stopped:
            client.shutdown()
            raise
    except Stopped:
        _tell_how_to_go_on(job, progress, stop)
        raise
    return client


def _tell_how_to_go_on(job: BatchJob, progress: BatchProgress, stop: StopSignals) -> None:
    logger.warning(
        "stopped by %s: %d of %d rows are in %s; run the same command again to go on from there",
        stop.name,
        progress.num_done,
        progress.num_rows,
        job.output,
    )

"""Batch inference over files: JSONL in, JSONL out, nothing lost and nothing twice.

Run it as `saqqara batch`, alone or inside `ray job submit`. Rows stream from the input with a
bounded number in flight, and every result is on disk as soon as the engine has finished it. The
same command after a kill goes on where the last one stopped.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from saqqara.cluster.engine.client import EngineClient
from saqqara.cluster.engine.report import EngineReport
from saqqara.cluster.failover import FailoverClient
from saqqara.cluster.launch import launch
from saqqara.cluster.long_wait import LongWait
from saqqara.cluster.request import RequestOutput
from saqqara.cluster.sampling import SamplingParams
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig

from .files import ResultFile, WriteError
from .fingerprint import fingerprint, resolved_settings
from .lines import BadLine, Row, RowParser
from .progress import BatchProgress
from .records import Record, bad_line_record, failed_record, rejected_record, result_record
from .source import BatchSource, InputSummary
from .stop import Stopped, StopSignals
from .summary import BatchSummary, integrity_of

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
SETTLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What to run: files, engine, and the settings of lines that bring none of their own.

    Args:
        input: JSONL of simple or OpenAI batch lines, see `lines`.
        output: JSONL of results, see `records`; appended to when the job is resumed.
        config: the engine.
        sampling: sampling of lines without their own.
        return_token_ids: also write the token ids of each answer.
        max_in_flight: rows that the engine has at once; default: twice `config.max_num_seqs`.
        overwrite: start anew instead of resuming, once the engine is up.
        served_model_name: a name for OpenAI lines and their records, besides the model's own.
        ignore_model: OpenAI lines may give any name.
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

    @property
    def model_name(self) -> str:
        """The name that OpenAI records give."""
        return self.served_model_name or self.config.model


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
            results.resume(_fingerprint(job, found))
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
    )


def _open_results(job: BatchJob, source: BatchSource) -> ResultFile:
    if source.is_same_file(job.output):
        raise ValueError(f"output: {job.output} is the input; choose another file")
    return ResultFile(job.output, job.overwrite)


def _fingerprint(job: BatchJob, found: InputSummary) -> dict[str, Any]:
    return fingerprint(
        job.config,
        job.sampling,
        found.sha256,
        return_token_ids=job.return_token_ids,
        served_model_name=job.served_model_name,
        ignore_model=job.ignore_model,
    )


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
        parser = RowParser(
            job.config.model,
            job.sampling.model_dump(exclude_unset=True),
            Retention.parse(job.config.retention, job.config.budget),
            job.served_model_name,
            job.ignore_model,
        )
        rows = (row for row in source.rows(parser) if row.line not in results.done)
        loop = _Loop(client, results, progress, job.model_name, job.return_token_ids)
        loop.run(rows, job.max_in_flight or 2 * job.config.max_num_seqs, stop)
        if stop.received is not None and not progress.is_complete:
            results.sync()
            _tell_how_to_go_on(job, progress, stop)  # before the engine's end, which takes a while
            stop.check()
        wall_seconds = time.perf_counter() - started
        report = _final_report(client)
        progress.show(report)
        return _Run(wall_seconds, started - start, report)


def _start(job: BatchJob, progress: BatchProgress, stop: StopSignals) -> EngineClient:
    """Start the job's engine; a signal ends that at once."""
    try:
        client = _launch(job.config)
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


def _launch(config: EngineConfig) -> EngineClient:
    """An engine that outlives its controller, if that is a process of its own."""
    if config.executor == "local":
        return launch(config)
    return FailoverClient(lambda: launch(config))


def _tell_how_to_go_on(job: BatchJob, progress: BatchProgress, stop: StopSignals) -> None:
    logger.warning(
        "stopped by %s: %d of %d rows are in %s; run the same command again to go on from there",
        stop.name,
        progress.num_done,
        progress.num_rows,
        job.output,
    )


def _final_report(client: EngineClient) -> EngineReport:
    """The engine's report once it has freed what the last row held, one step later."""
    deadline = time.monotonic() + SETTLE_SECONDS
    report = client.report()
    while report.pages_leaked is None and time.monotonic() < deadline:
        time.sleep(0.05)
        report = client.report()
    return report


@dataclass(slots=True)
class _Loop:
    """Keeps the engine filled and writes what it finishes."""

    client: EngineClient
    results: ResultFile
    progress: BatchProgress
    model: str
    return_token_ids: bool
    outputs: dict[int, dict[str, RequestOutput]] = field(default_factory=dict)  # by line

    def run(self, rows: Iterator[Row | BadLine], max_in_flight: int, stop: StopSignals) -> None:
        """Run rows until each has its record, or until a signal has come."""
        in_flight: dict[str, Row] = {}
        while True:
            self.progress.note(self.client)
            if stop.received is not None:
                self._take(in_flight, 0.0)
                return
            fresh = list(islice(rows, max(0, max_in_flight - len(in_flight))))
            in_flight |= self._submit(fresh)
            if in_flight:
                self._take(in_flight, POLL_SECONDS)
            elif not fresh:
                self.progress.note(self.client, force=True)
                return
            if self.progress.is_due():
                self.progress.show(self.client.report())

    def _submit(self, rows: list[Row | BadLine]) -> dict[str, Row]:
        """Hand rows to the engine; those it takes, by request id. The others get their record."""
        taken: dict[str, Row] = {}
        for row in rows:
            if isinstance(row, BadLine):
                self._write(bad_line_record(row))
            else:
                taken |= {request.request_id: row for request in row.requests}
        if taken:
            requests = [r for row in rows if isinstance(row, Row) for r in row.requests]
            for rejection in self.client.submit(requests):
                if (refused := taken.get(rejection.request_id)) is not None:
                    self._write(rejected_record(refused, rejection))
                    self._give_up(refused, taken)
        return taken

    def _take(self, in_flight: dict[str, Row], timeout_seconds: float) -> None:
        """Write what the engine has finished; waits for the first of it."""
        for output in self.client.poll(timeout_seconds):
            assert isinstance(output, RequestOutput)
            row = in_flight.pop(output.request_id, None)
            if row is not None:  # else: of a row that has its record
                self._finish(row, output)

    def _give_up(self, row: Row, taken: dict[str, Row]) -> None:
        """Of a row that has its error record, nothing more is wanted."""
        others = [request.request_id for request in row.requests if taken.pop(request.request_id)]
        if len(others) > 1:
            self.client.abort(others)

    def _finish(self, row: Row, output: RequestOutput) -> None:
        done = self.outputs.setdefault(row.line, {})
        done[output.request_id] = output
        if len(done) == len(row.requests):
            outputs = [done[request.request_id] for request in row.requests]
            del self.outputs[row.line]
            self._write_result(row, outputs)

    def _write_result(self, row: Row, outputs: list[RequestOutput]) -> None:
        """Write a row's answer; one that is no JSON costs only itself."""
        try:
            self._write(result_record(row, outputs, self.model, self.return_token_ids))
        except WriteError:
            raise
        except Exception as error:
            logger.exception("line %d: its answer cannot be written", row.line)
            self._write(failed_record(row, error))

    def _write(self, record: Record) -> None:
        self.results.write(record)
        self.progress.count(record)

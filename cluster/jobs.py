"""Batch inference over files: JSONL in, JSONL out, nothing lost and nothing twice.

Run it as `saqqara batch`, alone or inside `ray job submit`. Rows stream from the input with a
bounded number in flight, and every result is on disk as soon as the engine has finished it. The
same command after a kill goes on where the last one stopped.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig

from .batch_files import ResultFile, fingerprint, read_rows, scan_input
from .batch_input import BadLine, Row, RowParser
from .batch_output import Record, bad_line_record, rejected_record, result_record
from .batch_summary import BatchSummary, integrity_of
from .client import EngineClient
from .launch import launch
from .report import BatchRows, EngineReport
from .request import RequestOutput, SamplingParams

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
SETTLE_SECONDS = 10.0
BAR_SECONDS = 1.0
NOTE_SECONDS = 1.0  # between updates of the metrics
LOG_SECONDS = 10.0  # between progress lines where there is no terminal


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What to run: files, engine, and the settings of lines that bring none of their own.

    Args:
        input: JSONL of simple or OpenAI batch lines, see `batch_input`.
        output: JSONL of results, see `batch_output`; appended to when the job is resumed.
        config: the engine.
        sampling: sampling of lines without their own.
        return_token_ids: also write the token ids of each answer.
        max_in_flight: rows that the engine has at once; default: twice `config.max_num_seqs`.
        overwrite: start anew instead of resuming.
    """

    input: Path
    output: Path
    config: EngineConfig
    sampling: SamplingParams
    return_token_ids: bool = False
    max_in_flight: int | None = None
    overwrite: bool = False


def run_batch(job: BatchJob, client: EngineClient | None = None) -> BatchSummary:
    """Run a job to its end; an engine is started unless `client` brings one.

    Raises:
        ValueError: a file or setting is wrong; nothing has run then.
        EngineDeadError: the engine failed; what was answered is on disk.
    """
    if job.input.resolve() == job.output.resolve():
        raise ValueError(f"output: {job.output} is the input; choose another file")
    found = scan_input(job.input)
    settings = fingerprint(job.config, job.sampling, found.sha256, job.return_token_ids)
    parser = RowParser(
        job.config.model,
        job.sampling.model_dump(exclude_unset=True),
        Retention.parse(job.config.retention, job.config.budget),
    )
    with ResultFile(job.output, settings, job.overwrite) as results:
        resumed = len(results.done)
        if resumed:
            logger.info("%s has %d of %d rows", job.output, resumed, found.num_rows)
        progress = BatchProgress(found.num_rows, resumed)
        run = _Run()
        if resumed < found.num_rows:
            todo = (row for row in read_rows(job.input, parser) if row.line not in results.done)
            run = _run_rows(job, todo, results, progress, client)
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
        wall_seconds=run.wall_seconds,
        start_seconds=run.start_seconds,
        integrity=integrity_of(report, job.config.check_integrity) if report else None,
        report=report,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """Times and measurements of the rows that were run; the defaults stand for none."""

    wall_seconds: float = 0.0
    start_seconds: float = 0.0
    report: EngineReport | None = None


def _run_rows(
    job: BatchJob,
    rows: Iterator[Row | BadLine],
    results: ResultFile,
    progress: "BatchProgress",
    client: EngineClient | None,
) -> _Run:
    with ExitStack() as stack:
        start = time.perf_counter()
        if client is None:
            client = launch(job.config)
            stack.callback(client.shutdown)
        else:
            client.reset_stats()
        started = time.perf_counter()
        stack.enter_context(progress)
        loop = _Loop(client, results, progress, job.config.model, job.return_token_ids)
        loop.run(rows, job.max_in_flight or 2 * job.config.max_num_seqs)
        wall_seconds = time.perf_counter() - started
        report = _final_report(client)
        progress.show(report)
        return _Run(wall_seconds, started - start, report)


def _final_report(client: EngineClient) -> EngineReport:
    """The engine's report once it has freed what the last row held, one step later."""
    deadline = time.monotonic() + SETTLE_SECONDS
    report = client.report()
    while report.pages_leaked is None and time.monotonic() < deadline:
        time.sleep(0.05)
        report = client.report()
    return report


class BatchProgress:
    """How far a job is: a bar on a terminal, a log line now and then anywhere else."""

    def __init__(self, num_rows: int, resumed: int) -> None:
        self.answered = 0
        self.errors = 0
        self._num_rows = num_rows
        self._resumed = resumed
        self._noted = (0, 0)
        self._noted_time: float | None = None
        self._shown = time.monotonic()
        self._bar = _progress_bar() if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._num_rows, completed=self._resumed)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def count(self, record: Record) -> None:
        """One more record is written."""
        if record["error"] is None:
            self.answered += 1
        else:
            self.errors += 1

    def note(self, client: EngineClient, *, force: bool = False) -> None:
        """Tell the engine's metrics, if it is time or with `force`."""
        now = time.monotonic()
        if not force and self._noted_time is not None and now - self._noted_time < NOTE_SECONDS:
            return
        self._noted_time = now
        answered, errors = self._noted
        self._noted = (self.answered, self.errors)
        done = self._resumed + self.answered + self.errors
        client.note_rows(
            BatchRows(
                num_rows=self._num_rows,
                num_left=self._num_rows - done,
                num_answered=self.answered - answered,
                num_errors=self.errors - errors,
            )
        )

    def is_due(self) -> bool:
        """Whether it is time to show something again."""
        return time.monotonic() - self._shown >= (LOG_SECONDS if self._bar is None else BAR_SECONDS)

    def show(self, report: EngineReport) -> None:
        """Bring the bar up to date, or log a line."""
        self._shown = time.monotonic()
        done = self._resumed + self.answered + self.errors
        text = (
            f"{self.errors} errors; prompts {report.prompt_tokens:,} tokens "
            f"({report.prompt_tokens_per_second:,.1f}/s), answers {report.generation_tokens:,} "
            f"({report.generation_tokens_per_second:,.1f}/s)"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        else:
            logger.info("%d of %d rows, %s", done, self._num_rows, text)


def _progress_bar() -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


@dataclass(slots=True)
class _Loop:
    """Keeps the engine filled and writes what it finishes."""

    client: EngineClient
    results: ResultFile
    progress: BatchProgress
    model: str
    return_token_ids: bool
    outputs: dict[int, dict[str, RequestOutput]] = field(default_factory=dict)  # by line

    def run(self, rows: Iterator[Row | BadLine], max_in_flight: int) -> None:
        in_flight: dict[str, Row] = {}
        while True:
            self.progress.note(self.client)
            fresh = list(islice(rows, max(0, max_in_flight - len(in_flight))))
            in_flight |= self._submit(fresh)
            if in_flight:
                for output in self.client.poll(POLL_SECONDS):
                    assert isinstance(output, RequestOutput)
                    row = in_flight.pop(output.request_id, None)
                    if row is not None:  # else: of a row that has its record
                        self._finish(row, output)
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
            self._write(result_record(row, outputs, self.model, self.return_token_ids))

    def _write(self, record: Record) -> None:
        self.results.write(record)
        self.progress.count(record)

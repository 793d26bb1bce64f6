"""How far a batch job is, for people and for metrics."""

import logging
import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from saqqara.cluster.engine.client import EngineClient
from saqqara.cluster.engine.report import BatchRows, EngineReport

from .records import Record

logger = logging.getLogger(__name__)

BAR_SECONDS = 1.0
NOTE_SECONDS = 1.0  # between updates of the metrics
LOG_SECONDS = 4.0  # between progress lines where there is no terminal


class BatchProgress:
    """How far a job is: a bar on a terminal, a log line now and then anywhere else."""

    def __init__(self, num_rows: int, resumed: int) -> None:
        self.answered = 0
        self.errors = 0
        self.num_rows = num_rows
        self._resumed = resumed
        self._noted = (0, 0)
        self._noted_time: float | None = None
        self._shown = time.monotonic()
        self._bar = _progress_bar() if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        self._shown = time.monotonic()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self.num_rows, completed=self._resumed)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def num_done(self) -> int:
        """Rows that have a record, those of earlier runs too."""
        return self._resumed + self.answered + self.errors

    @property
    def is_complete(self) -> bool:
        """Whether every row has a record."""
        return self.num_done >= self.num_rows

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
        client.note_rows(
            BatchRows(
                num_rows=self.num_rows,
                num_left=self.num_rows - self.num_done,
                num_answered=self.answered - answered,
                num_errors=self.errors - errors,
            )
        )

    def is_due(self) -> bool:
        """Whether it is time to show something again."""
        return time.monotonic() - self._shown >= (LOG_SECONDS if self._bar is None else BAR_SECONDS)

    def show(self, report: EngineReport) -> None:
        """Bring the bar up to date, or log a line."""
        self.tell(
            f"prompts {report.prompt_tokens:,} tokens ({report.prompt_tokens_per_second:,.1f}/s), "
            f"answers {report.generation_tokens:,} ({report.generation_tokens_per_second:,.1f}/s)"
        )

    def tell(self, what: str) -> None:
        """Bring the bar up to date, or log a line, with words on how it goes."""
        self._shown = time.monotonic()
        text = f"{self.errors} errors; {what}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.num_done, description=text)
        else:
            logger.info("%d of %d rows, %s", self.num_done, self.num_rows, text)


def _progress_bar() -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )

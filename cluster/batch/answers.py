"""Answers rows: keeps an engine filled, and writes a record for each row that it finishes."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from saqqara.cluster.engine.client import EngineClient
from saqqara.cluster.engine.report import EngineReport
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.openai.tools.reading import ChatReading
from saqqara.cluster.request import RequestOutput
from saqqara.cluster.sampling import SamplingParams
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig

from .files import WriteError
from .lines import BadLine, Row, RowParser
from .records import Record, bad_line_record, failed_record, rejected_record, result_record

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
SETTLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """What answers to rows come from.

    Args:
        config: the engine.
        sampling: sampling of rows without their own.
        return_token_ids: also write the token ids of each answer.
        served_model_name: a name for OpenAI lines and their records, besides the model's own.
        ignore_model: OpenAI lines may give any name.
        max_in_flight: rows that an engine has at once; default: twice its slots.
    """

    config: EngineConfig
    sampling: SamplingParams
    return_token_ids: bool = False
    served_model_name: str | None = None
    ignore_model: bool = False
    max_in_flight: int | None = None

    @property
    def model_name(self) -> str:
        """The name that OpenAI records give."""
        return self.served_model_name or self.config.model

    def most_in_flight(self, client: EngineClient) -> int:
        """Rows that an engine has at once."""
        return self.max_in_flight or 2 * self.config.settled(client.describe().workers).max_num_seqs

    @property
    def retention(self) -> Retention:
        """What the engine keeps for rows that bring no retention of their own."""
        return Retention.parse(self.config.retention, self.config.budget)

    def parser(self, file: str | None = None) -> RowParser:
        """What reads the rows; `file` is the input's name where a job has several."""
        return RowParser(
            self.config.model,
            self.sampling.model_dump(exclude_unset=True),
            self.retention,
            self.served_model_name,
            self.ignore_model,
            file,
            ChatReading(
                lambda: Tokenizer.load(self.config.tokenizer or self.config.model),
                self.config.tool_call_parser,
                self.config.reasoning_parser,
            ),
        )

    def written(self) -> dict[str, Any]:
        """The settings that change what is written, beside engine and sampling."""
        return {
            "return_token_ids": self.return_token_ids,
            "served_model_name": self.served_model_name,
            "ignore_model": self.ignore_model,
        }


@dataclass(slots=True)
class RowLoop:
    """Keeps the engine filled and hands on the records of what it finishes.

    Args:
        client: the engine.
        settings: what answers come from.
        write: takes each record, one for each row.
        tick: called in every turn, with whether it is the last one.
        is_stopped: whether to end early; rows in flight then have no record.
        room: how many more rows the engine may have, of so many in flight here; default: as many
            as `settings` say.
        gate: entered while rows are handed over, for engines that several loops fill.
        poll_seconds: how long a turn waits for outputs.
    """

    client: EngineClient
    settings: AnswerSettings
    write: Callable[[Record], None]
    tick: Callable[[bool], None]
    is_stopped: Callable[[], bool]
    room: Callable[[int], int] | None = None
    gate: AbstractContextManager[Any] = field(default_factory=nullcontext)
    poll_seconds: float = POLL_SECONDS
    outputs: dict[int, dict[str, RequestOutput]] = field(default_factory=dict)  # by line

    def run(self, rows: Iterator[Row | BadLine]) -> None:
        """Run rows until each has its record, or until it is stopped."""
        in_flight: dict[str, Row] = {}
        while True:
            self.tick(False)
            if self.is_stopped():
                self._take(in_flight, 0.0)
                return
            with self.gate:
                room = max(0, self._room(len(in_flight)))
                fresh = list(islice(rows, room))
                in_flight |= self._submit(fresh)
            if in_flight:
                self._take(in_flight, self.poll_seconds)
            elif room == 0:  # others have filled the engine
                time.sleep(self.poll_seconds)
            elif not fresh:
                self.tick(True)
                return

    def _room(self, num_in_flight: int) -> int:
        if self.room is not None:
            return self.room(num_in_flight)
        return self.settings.most_in_flight(self.client) - num_in_flight

    def _submit(self, rows: list[Row | BadLine]) -> dict[str, Row]:
        """Hand rows to the engine; those it takes, by request id. The others get their record."""
        taken: dict[str, Row] = {}
        for row in rows:
            if isinstance(row, BadLine):
                self.write(bad_line_record(row))
            else:
                taken |= {request.request_id: row for request in row.requests}
        if taken:
            requests = [r for row in rows if isinstance(row, Row) for r in row.requests]
            for rejection in self.client.submit(requests):
                if (refused := taken.get(rejection.request_id)) is not None:
                    self.write(rejected_record(refused, rejection))
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
        settings = self.settings
        try:
            self.write(result_record(row, outputs, settings.model_name, settings.return_token_ids))
        except WriteError:
            raise
        except Exception as error:
            logger.exception("line %d: its answer cannot be written", row.line)
            self.write(failed_record(row, error))


def final_report(client: EngineClient) -> EngineReport:
    """The engine's report once it has freed what the last row held, one step later."""
    deadline = time.monotonic() + SETTLE_SECONDS
    report = client.report()
    while report.pages_leaked is None and time.monotonic() < deadline:
        time.sleep(0.05)
        report = client.report()
    return report

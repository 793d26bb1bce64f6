"""One batch, from its claim to its end, or until it is handed back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar
from uuid import uuid4

from saqqara.cluster.batch_store.inputs import InputLine, check_input, read_input
from saqqara.cluster.batch_store.leases import Lease
from saqqara.cluster.batch_store.outputs import finish_batch, record
from saqqara.cluster.batch_store.progress import LineResult
from saqqara.cluster.batch_store.records import LineError, NotFoundError, StoredFile, Usage
from saqqara.cluster.batch_store.store import Store
from saqqara.cluster.openai.batches import check_no_turn, check_not_streamed
from saqqara.cluster.openai.errors import ApiError

from .answers import Answers, LineAnswer
from .room import Room

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_LOSSES = 3
"""So many processes end with a line in them before it is given up."""
FIRST_RETRY_SECONDS = 0.2  # while the server has no room for a line
MAX_RETRY_SECONDS = 5.0
_NOT_NOW = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


@dataclass(slots=True)
class BatchRun:
    """Runs a batch.

    Args:
        store: where it is.
        lease: the right to run it.
        answers: what answers its lines.
        room: of all batches of this process.
        threads: where the store is waited for.
        poll_seconds: how long a cancelled batch may go unnoticed.
    """

    store: Store
    lease: Lease
    answers: Answers
    room: Room
    threads: Executor
    poll_seconds: float = 1.0
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _look: asyncio.Event = field(default_factory=asyncio.Event)
    _num_bytes: int = 0  # of all results
    _finished: list[LineResult] = field(default_factory=list)
    _committing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def look(self) -> None:
        """Look at once whether the batch was cancelled."""
        self._look.set()

    async def run(self) -> None:
        """Bring the batch to its end. If this is cancelled, the batch is to be handed back.

        Raises:
            LeaseLostError: (in a group) another runner has it.
        """
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch())
            try:
                await self._to_the_end()
            except NotFoundError as error:  # somebody has deleted what is in the folder
                gone = LineError("file_not_found", str(error), None, "input_file_id")
                await self._in_thread(self.store.progress.fail, self.lease, [gone])
            watch.cancel()

    async def _to_the_end(self) -> None:
        batch = self.lease.batch
        if batch.status == "validating" and not await self._has_valid_input():
            return
        if batch.status in ("validating", "in_progress"):
            lines = asyncio.ensure_future(self._run_lines())
            over = asyncio.ensure_future(self._over.wait())
            try:
                await asyncio.wait((lines, over), return_when=asyncio.FIRST_COMPLETED)
                if lines.done():
                    lines.result()
            finally:
                lines.cancel()
                over.cancel()
                await asyncio.gather(lines, over, return_exceptions=True)
        store = self.store
        await self._in_thread(finish_batch, self.lease, store.progress, store.files, store.limits)

    async def _watch(self) -> None:
        """Keep the lease, and see when the batch is to end."""
        leases = self.store.leases
        renew_seconds = leases.lease_seconds / 3
        now = self.store.now
        renewed = now()
        while True:
            if now() - renewed >= renew_seconds:
                renewed = now()
                batch = await self._in_thread(leases.renew, self.lease)
            else:
                batch = await self._in_thread(leases.look, self.lease)
            if batch.status == "cancelling" or now() >= batch.expires_at:
                self._over.set()
            try:
                async with asyncio.timeout(self.poll_seconds):
                    await self._look.wait()
            except TimeoutError:
                pass
            self._look.clear()

    async def _has_valid_input(self) -> bool:
        """Read all of the input; whether there is something to run."""
        num_lines, errors = await self._in_thread(self._check_input)
        if errors:
            await self._in_thread(self.store.progress.fail, self.lease, errors)
            return False
        await self._in_thread(self.store.progress.begin, self.lease, num_lines)
        return True

    def _check_input(self) -> tuple[int, tuple[LineError, ...]]:
        with self.store.files.open(self._input()) as file:
            return check_input(file, self.lease.batch.endpoint, self.store.limits)

    def _input(self) -> StoredFile:
        batch = self.lease.batch
        return self.store.files.get(batch.owner, batch.input_file_id)

    async def _run_lines(self) -> None:
        """Run every line that has no result."""
        batch, progress = self.lease.batch, self.store.progress
        done = await self._in_thread(progress.done_lines, batch.id)
        losses = await self._in_thread(progress.losses, batch.id)
        self._num_bytes = await self._in_thread(progress.num_bytes, batch.id)
        # Opened here and not in a thread, which nobody would close it for after a cancel.
        with self.store.files.open(await self._in_thread(self._input)) as file:
            if losses:
                await self._run_suspects(read_input(file, self.store.limits), losses)
                await self._in_thread(file.seek, 0)
            skipped = done | losses.keys()
            async with asyncio.TaskGroup() as group:
                async for line in self._read(read_input(file, self.store.limits)):
                    if line.number not in skipped:
                        places = self.room.fitting(line.body)
                        await self.room.enter(places)
                        task = group.create_task(self._run_line(line))
                        task.add_done_callback(partial(self._leave, places))

    async def _run_suspects(self, lines: Iterator[InputLine], losses: Mapping[int, int]) -> None:
        """Run lines that a process was lost with, each alone: then only the one to blame is lost.

        Of other batches of this process, too, nothing is under way meanwhile.
        """
        async for line in self._read(lines):
            num_losses = losses.get(line.number, 0)
            if num_losses >= MAX_LOSSES:
                await self._commit(self._lost(line, num_losses))
            elif num_losses:
                await self.room.enter(self.room.capacity)
                try:
                    await self._run_line(line)
                finally:
                    self.room.leave(self.room.capacity)

    async def _run_line(self, line: InputLine) -> None:
        """Answer a line and keep the result."""
        if self._num_bytes > self.store.limits.max_output_bytes:
            await self._commit(self._without_room(line))
            return
        await self._in_thread(self.store.progress.start, self.lease, [line.number])
        try:
            result = self._result(line, await self._answer(line))
        except Exception as error:  # a fault of ours, but no line may keep its batch from its end
            logger.exception("%s: line %d", self.lease.batch.id, line.number)
            message = f"the answer cannot be written: {type(error).__name__}: {error}"
            failure = ApiError(500, message, None, "internal_error")
            result = self._result(line, LineAnswer(failure.status, failure.body))
        await self._commit(result)

    def _leave(self, places: int, task: "asyncio.Task[None]") -> None:
        """Give places back, also of a task that was cancelled before it began."""
        self.room.leave(places)

    async def _answer(self, line: InputLine) -> LineAnswer:
        try:
            check_not_streamed(line.body.get("stream"), "a batch")
            check_no_turn(line.body.get("conversation_id"))
        except ApiError as error:
            return LineAnswer(error.status, error.body)
        seconds = FIRST_RETRY_SECONDS
        while True:
            answer = await self.answers(self.lease.batch.owner, line.url, line.body)
            if answer.status not in _NOT_NOW:
                return answer
            await asyncio.sleep(seconds)
            seconds = min(2 * seconds, MAX_RETRY_SECONDS)

    async def _commit(self, result: LineResult) -> None:
        """Keep a result, together with those that come while others are being kept."""
        self._finished.append(result)
        self._num_bytes += len(result.record)
        async with self._committing:
            results, self._finished = self._finished, []
            if results:
                await self._in_thread(self.store.progress.commit, self.lease, results)

    def _result(self, line: InputLine, answer: LineAnswer) -> LineResult:
        response = {
            "status_code": answer.status,
            "request_id": f"req_{uuid4().hex}",
            "body": answer.body,
        }
        data = record(self.lease.batch.id, line.number, line.custom_id, response, None)
        if answer.status != HTTPStatus.OK:
            return LineResult(line.number, data, is_error=True)
        return LineResult(line.number, data, is_error=False, usage=_usage(answer.body))

    def _lost(self, line: InputLine, num_losses: int) -> LineResult:
        logger.error("%s: line %d is given up", self.lease.batch.id, line.number)
        why = (
            f"the server's process has ended {num_losses} times while it ran this request, so it "
            "is not run again"
        )
        return self._not_run(line, "request_lost", why)

    def _without_room(self, line: InputLine) -> LineResult:
        most = self.store.limits.max_output_bytes
        why = f"the answers of the batch have {most} bytes already (batches.max_output_bytes)"
        return self._not_run(line, "output_too_large", why)

    def _not_run(self, line: InputLine, code: str, why: str) -> LineResult:
        error = (code, why)
        data = record(self.lease.batch.id, line.number, line.custom_id, None, error)
        return LineResult(line.number, data, is_error=True)

    async def _read(self, lines: Iterator[InputLine]) -> AsyncIterator[InputLine]:
        while (line := await self._in_thread(next, lines, None)) is not None:
            yield line

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, function, *arguments)


def _usage(body: Any) -> Usage:
    """The tokens of an answer, by the names of completions or of responses."""
    given = body.get("usage") or {}

    def count(*names: str) -> int:
        return next((int(given[name]) for name in names if given.get(name) is not None), 0)

    def detail(part: str, *names: str) -> int:
        details: dict[str, Any] = next((given[name] for name in names if given.get(name)), {})
        return int(details.get(part) or 0)

    return Usage(
        input_tokens=count("input_tokens", "prompt_tokens"),
        cached_tokens=detail("cached_tokens", "input_tokens_details", "prompt_tokens_details"),
        output_tokens=count("output_tokens", "completion_tokens"),
        reasoning_tokens=detail(
            "reasoning_tokens", "output_tokens_details", "completion_tokens_details"
        ),
    )

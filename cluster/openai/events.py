"""Streams of the HTTP API: the engine's outputs as server-sent events.

What is the same in every event of an answer is rendered once, and the events of one step are one
write.
"""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from saqqara.cluster.errors import EngineDeadError, WorkerDiedError
from saqqara.cluster.request import RequestOutput

from .errors import ApiError
from .replies import (
    ChoiceProgress,
    ReplyHead,
    check_served,
    chunk_choice,
    to_bytes,
    to_json,
    usage,
)

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
DEAD_RETRY_SECONDS = 10


async def event_stream(
    head: ReplyHead,
    outputs: AsyncIterator[tuple[int, RequestOutput]],
    num_choices: int,
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The events of an answer, as bytes.

    Errors that come before the first event are raised; later ones become the last event.

    Args:
        head: of the answer.
        outputs: (place of the prompt in the request, what there is of its answer).
        num_choices: `n`.
        include_usage: end with an event that has the usage and no choices.
    """
    writer = _EventWriter(head, num_choices, include_usage)
    latest: dict[int, RequestOutput] = {}
    has_begun = False
    try:
        async for place, output in outputs:
            check_served(output)
            latest[place] = output
            if events := writer.events(place, output):
                has_begun = True
                yield events
    except (ApiError, EngineDeadError) as error:
        if not has_begun:
            raise
        logger.warning("a stream has ended early: %s", error)
        yield _event(error_body(error))
    else:
        last = writer.usage_event(latest) if include_usage else b""
        yield last + DONE


def error_body(error: ApiError | EngineDeadError) -> Mapping[str, Any]:
    """The JSON of an error."""
    if isinstance(error, EngineDeadError):
        error = dead_engine(error)
    return error.body


def dead_engine(error: EngineDeadError) -> ApiError:
    """What clients hear when the engine has ended: what it has lost. The rest is in the log."""
    cause = error.__cause__
    if cause is None:
        message = str(error)
    elif isinstance(cause, WorkerDiedError) and cause.rank >= 0:
        message = f"the engine has lost rank {cause.rank} and is being replaced"
    else:
        message = f"the engine has failed ({type(cause).__name__}) and is being replaced"
    wait = {"Retry-After": str(DEAD_RETRY_SECONDS)}
    return ApiError(503, message, None, "engine_dead", wait)


class _EventWriter:
    """Renders the events of one answer."""

    def __init__(self, head: ReplyHead, num_choices: int, include_usage: bool) -> None:
        self._head = head
        self._num_choices = num_choices
        fixed = to_bytes(head.json(is_chunk=True))[:-1].decode()
        self._before = f'data: {fixed},"choices":['
        self._after = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._sent: dict[int, ChoiceProgress] = {}

    def events(self, place: int, output: RequestOutput) -> bytes:
        """One event per choice that has something new."""
        events = []
        for choice in output.outputs:
            index = place * self._num_choices + choice.index
            sent = self._sent.setdefault(index, ChoiceProgress())
            if sent.has_finished:
                continue
            data = chunk_choice(self._head, index, choice, sent)
            if data is not None:
                text = to_json(data)
                events.append(f"{self._before}{text}{self._after}")
        return "".join(events).encode()

    def usage_event(self, latest: Mapping[int, RequestOutput]) -> bytes:
        """The last event, which has the usage."""
        data = {**self._head.json(is_chunk=True), "choices": [], "usage": usage(latest.values())}
        return _event(data)


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + to_bytes(data) + b"\n\n"

"""Streams of the HTTP API: the engine's outputs as server-sent events.

What is the same in every event of an answer is rendered once, and the events of one step are one
write.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from saqqara.cluster.errors import EngineDeadError, WorkerDiedError
from saqqara.cluster.request import RequestOutput

from .errors import ApiError
from .replies import (
    MANY_LOGPROBS,
    ChoiceProgress,
    ReplyHead,
    check_served,
    chunk_choice,
    in_pieces,
    num_logprobs,
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
    *,
    include_usage: bool,
    continuous_usage: bool = False,
) -> AsyncGenerator[bytes, None]:
    """The events of an answer, as bytes.

    Errors that come before the first event are raised; later ones become the last event.

    Args:
        head: of the answer.
        outputs: (place of the prompt in the request, what there is of its answer).
        include_usage: end with an event that has the usage and no choices.
        continuous_usage: every event has the usage so far.
    """
    writer = _EventWriter(head, include_usage, continuous_usage)
    latest: dict[int, RequestOutput] = {}
    has_begun = False
    try:
        async for place, output in outputs:
            check_served(output)
            latest[place] = output
            if writer.has_much(place, output):  # of a prompt that is echoed: others go on meanwhile
                events = await asyncio.to_thread(writer.events, place, latest)
            else:
                events = writer.events(place, latest)
            if events:
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

    def __init__(self, head: ReplyHead, include_usage: bool, continuous_usage: bool) -> None:
        self._head = head
        self._continuous_usage = continuous_usage
        fixed = to_bytes(head.json(is_chunk=True))[:-1].decode()
        self._before = f'data: {fixed},"choices":['
        self._after = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._sent: dict[int, ChoiceProgress] = {}

    def has_much(self, place: int, output: RequestOutput) -> bool:
        """Whether the next events of a prompt take long to write."""
        shown = self._head.shown
        if not shown.echo or shown.num_logprobs is None or output.prompt_logprobs is None:
            return False
        starts = place * shown.num_choices not in self._sent
        return starts and num_logprobs([output]) > MANY_LOGPROBS

    def events(self, place: int, latest: Mapping[int, RequestOutput]) -> bytes:
        """One event per choice of a prompt that has something new.

        Args:
            place: of the prompt.
            latest: what there is by now, by place.
        """
        output, events = latest[place], []
        for choice in output.outputs:
            index = place * self._head.shown.num_choices + choice.index
            sent = self._sent.setdefault(index, ChoiceProgress())
            if sent.has_finished:
                continue
            is_first = not sent.has_started
            data = chunk_choice(self._head, index, output, choice, sent)
            if data is not None:
                end = self._end(output, latest, is_first=is_first)
                text = b"".join(in_pieces(data)).decode() if is_first else to_json(data)
                events.append(f"{self._before}{text}{end}")
        return "".join(events).encode()

    def _end(
        self, output: RequestOutput, latest: Mapping[int, RequestOutput], *, is_first: bool
    ) -> str:
        """What comes after the choice of an event."""
        shows_prompt = is_first and self._head.is_chat and self._head.shown.prompt_token_ids
        if not shows_prompt and not self._continuous_usage:
            return self._after
        prompt = f',"prompt_token_ids":{to_json(output.prompt_token_ids)}' if shows_prompt else ""
        if not self._continuous_usage:
            return f"]{prompt}{self._after[1:]}"
        counts = to_json(usage(latest.values(), self._head.shown))
        return f']{prompt},"usage":{counts}}}\n\n'

    def usage_event(self, latest: Mapping[int, RequestOutput]) -> bytes:
        """The last event, which has the usage."""
        counts = usage(latest.values(), self._head.shown)
        data = {**self._head.json(is_chunk=True), "choices": [], "usage": counts}
        return _event(data)


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + to_bytes(data) + b"\n\n"

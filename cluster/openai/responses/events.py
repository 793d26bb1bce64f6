"""Streams of responses: the engine's outputs as OpenAI's typed events."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.events import error_body
from saqqara.cluster.openai.replies import check_served, to_json
from saqqara.cluster.openai.tools.reader import AnswerReader
from saqqara.cluster.request import RequestOutput

from .content_tokens import ContentTokens
from .output import Output
from .reply import ResponseHead

logger = logging.getLogger(__name__)

Json = dict[str, Any]


CountTokens = Callable[[str], Awaitable[int]]


class ResponseProgress:
    """What there is of an answer, brought up to date with each output of the engine.

    Args:
        head: of the response.
    """

    def __init__(self, head: ResponseHead) -> None:
        self.output = Output()
        self._head = head
        self._reader = AnswerReader(head.answers)
        self._tokens = ContentTokens(head.sampling.logprobs or 0)
        self._num_chars = 0
        self._num_tokens = 0

    def take(self, output: RequestOutput) -> list[Json]:
        """The events of what is new."""
        choice = output.outputs[0]
        new = (choice.logprobs or ())[self._num_tokens :]
        self._num_tokens = len(choice.token_ids)
        events: list[Json] = []
        if new and self._head.answers.is_plain:
            self._tokens.take_all(new)
        elif new:  # token by token, so that each is with the text that it is of
            for entry in new:
                self._tokens.take(entry)
                num_chars = min(self._tokens.num_chars, len(choice.text))
                if num_chars > self._num_chars:
                    self._num_chars = num_chars
                    events += self._read(choice.text[:num_chars], is_finished=False)
        self._num_chars = max(self._num_chars, len(choice.text))
        events += self._read(choice.text, is_finished=choice.finished)
        if choice.finished:
            events += self.output.end(is_cut=choice.finish_reason == "length")
        return events

    def _read(self, text: str, *, is_finished: bool) -> list[Json]:
        """The events of what a longer text says more."""
        delta = self._reader.read(text, is_finished=is_finished)
        logprobs: list[Json] = []
        if self._head.answers.is_plain:
            logprobs = self._tokens.give_all()
        elif delta:
            logprobs = self._tokens.give(len(delta.content))
        events: list[Json] = []
        for call in delta.calls:  # what goes on comes before what is new
            if call.name is None:
                events += self.output.add_arguments(call.arguments)
        if delta.reasoning:
            events += self.output.add_reasoning(delta.reasoning)
        if delta.content or logprobs:
            events += self.output.add_text(delta.content, logprobs)
        for call in delta.calls:
            if call.name is not None:
                events += self.output.begin_call(call.id or "", call.name)
                events += self.output.add_arguments(call.arguments)
        return events


async def ended_response(
    head: ResponseHead, progress: ResponseProgress, output: RequestOutput, count: CountTokens
) -> Json:
    """The whole response; `output` is the engine's last."""
    thoughts = progress.output.reasoning
    num_thoughts = await count(thoughts) if thoughts else 0
    return head.ended(progress.output.items, output, num_thoughts)


async def full_response(head: ResponseHead, output: RequestOutput, count: CountTokens) -> Json:
    """The answer to a request that is not streamed; `count` counts the tokens of a text."""
    progress = ResponseProgress(head)
    progress.take(output)
    return await ended_response(head, progress, output, count)


async def response_stream(
    head: ResponseHead, outputs: AsyncIterator[tuple[int, RequestOutput]], count: CountTokens
) -> AsyncGenerator[bytes, None]:
    """The events of a response, as bytes.

    Errors that come before the first event are raised; later ones become the events `error` and
    `response.failed`.

    Args:
        head: of the response.
        outputs: (0, what there is of the answer).
        count: counts the tokens of a text.
    """
    writer = _Writer()
    progress = ResponseProgress(head)
    latest = None
    try:
        async for _, output in outputs:
            check_served(output)
            events = progress.take(output)
            if latest is None:
                begun = head.json([])
                events = [_state("created", begun), _state("in_progress", begun), *events]
            latest = output
            if events:
                yield writer.write(events)
    except (ApiError, EngineDeadError) as error:
        if latest is None:
            raise
        logger.warning("a stream has ended early: %s", error)
        yield writer.write(_failure(head, progress, error))
    else:
        assert latest is not None, "an answer has at least its end"
        response = await ended_response(head, progress, latest, count)
        yield writer.write([_state(response["status"], response)])


class _Writer:
    """Numbers and renders the events of one response."""

    def __init__(self) -> None:
        self._num_events = 0

    def write(self, events: Iterable[Json]) -> bytes:
        """The events as they are sent."""
        parts = []
        for event in events:
            data = to_json({**event, "sequence_number": self._num_events})
            self._num_events += 1
            parts.append(f"event: {event['type']}\ndata: {data}\n\n")
        return "".join(parts).encode()


def _state(name: str, response: Json) -> Json:
    return {"type": f"response.{name}", "response": response}


def _failure(
    head: ResponseHead, progress: ResponseProgress, error: ApiError | EngineDeadError
) -> list[Json]:
    """What is said when an answer ends before its end."""
    body: Mapping[str, Any] = error_body(error)["error"]
    said = {"code": body["code"], "message": body["message"]}
    failed = head.json(
        progress.output.items, "failed", error={"code": "server_error", "message": said["message"]}
    )
    return [{"type": "error", **said, "param": body["param"]}, _state("failed", failed)]

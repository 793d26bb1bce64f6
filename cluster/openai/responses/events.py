"""Streams of responses: the engine's outputs as OpenAI's typed events."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from typing import Any

from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.events import error_body
from saqqara.cluster.openai.logprobs import chat_logprobs
from saqqara.cluster.openai.replies import check_served, to_json
from saqqara.cluster.request import RequestOutput

from .output import Output
from .reply import ResponseHead

logger = logging.getLogger(__name__)

Json = dict[str, Any]


class ResponseProgress:
    """What there is of an answer, brought up to date with each output of the engine.

    Args:
        head: of the response.
    """

    def __init__(self, head: ResponseHead) -> None:
        self.output = Output()
        self._head = head
        self._num_chars = 0
        self._num_tokens = 0

    def take(self, output: RequestOutput) -> list[Json]:
        """The events of what is new."""
        choice = output.outputs[0]
        text = choice.text[self._num_chars :]
        logprobs: list[Json] = []
        if choice.logprobs is not None:
            new = choice.logprobs[self._num_tokens :]
            count = self._head.sampling.logprobs or 0
            logprobs = chat_logprobs(new, count, show_token_ids=False)["content"]
        self._num_chars, self._num_tokens = len(choice.text), len(choice.token_ids)
        events = self.output.add_text(text, logprobs) if text or logprobs else []
        if choice.finished:
            events += self.output.end(is_cut=choice.finish_reason == "length")
        return events


def full_response(head: ResponseHead, output: RequestOutput) -> Json:
    """The answer to a request that is not streamed."""
    progress = ResponseProgress(head)
    progress.take(output)
    return head.ended(progress.output.items, output)


async def response_stream(
    head: ResponseHead, outputs: AsyncIterator[tuple[int, RequestOutput]]
) -> AsyncGenerator[bytes, None]:
    """The events of a response, as bytes.

    Errors that come before the first event are raised; later ones become the events `error` and
    `response.failed`.

    Args:
        head: of the response.
        outputs: (0, what there is of the answer).
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
        response = head.ended(progress.output.items, latest)
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

"""The output records of a batch job, in the format of the line that asked; no I/O.

Simple lines get `{line, custom_id, text, finish_reason, usage, error}`, OpenAI batch lines the
records of OpenAI's batch output files, plus `line`. Replies and errors are those of the HTTP API.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from saqqara.cluster.engine.client import Rejection
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.replies import ReplyHead, check_served, full_reply
from saqqara.cluster.request import RequestOutput

from .lines import BadLine, Row

Record = dict[str, Any]

_BESIDE_TEXT = ("tool_calls", "reasoning_content")
_OF_PROMPT = ("prompt_token_ids", "prompt_logprobs")


def result_record(
    row: Row, outputs: Sequence[RequestOutput], model: str, return_token_ids: bool
) -> Record:
    """The record of a row that the engine has finished.

    Args:
        row: what was asked.
        outputs: the finished output of each of its prompts.
        model: the model's name, for OpenAI records.
        return_token_ids: also write the answer's token ids.
    """
    try:
        for output in outputs:
            check_served(output)
    except ApiError as error:
        return _error_record(row.line, row.custom_id, row.url, error.renamed(row.names))
    shown = replace(row.shown, token_ids=row.shown.token_ids or return_token_ids)
    if row.url is None and shown.echo and shown.num_prompt_logprobs is None:
        shown = replace(shown, num_prompt_logprobs=shown.num_logprobs)
    head = ReplyHead(
        id=f"{'chatcmpl' if row.is_chat else 'cmpl'}-{row.line}",
        created=int(outputs[0].metrics.arrival_time),
        model=model,
        is_chat=row.is_chat or row.url is None,  # simple records list log-probabilities as chats do
        shown=shown,
        answers=row.answers,
    )
    reply = full_reply(head, outputs)
    if row.url is None:
        return _simple_record(row, reply)
    return {
        "id": f"batch_req_{row.line}",
        "line": row.line,
        "custom_id": row.custom_id,
        "response": {
            "status_code": 200,
            "request_id": row.requests[0].request_id,
            "body": reply,
        },
        "error": None,
    }


def bad_line_record(bad: BadLine) -> Record:
    """The error record of a line that is not a request."""
    error = ApiError(400, bad.message, bad.field, bad.code)
    return _error_record(bad.line, bad.custom_id, bad.url, error)


def rejected_record(row: Row, rejection: Rejection) -> Record:
    """The error record of a row that the engine did not take."""
    error = ApiError.rejected(rejection.error, "prompt", is_too_long=rejection.is_too_long)
    return _error_record(row.line, row.custom_id, row.url, error.renamed(row.names))


def failed_record(row: Row, error: Exception) -> Record:
    """The error record of a row whose answer cannot be written as JSON."""
    message = f"the answer cannot be written: {type(error).__name__}: {error}"
    failure = ApiError(500, message, None, "internal_error")
    return _error_record(row.line, row.custom_id, row.url, failure)


def _error_record(line: int, custom_id: str | None, url: str | None, error: ApiError) -> Record:
    record: Record = {"line": line, "custom_id": custom_id}
    if url is None:
        record |= {"text": None, "finish_reason": None, "usage": None}
    else:
        record |= {"id": f"batch_req_{line}", "response": None}
    return {**record, **error.body}


def _simple_record(row: Row, reply: Record) -> Record:
    answers = [_simple_answer(choice) for choice in reply["choices"]]
    record: Record = {"line": row.line, "custom_id": row.custom_id, **answers[0]}
    record |= {"usage": reply["usage"], "error": None}
    record |= {name: reply[name] for name in _OF_PROMPT if name in reply}
    if len(answers) > 1:
        record["choices"] = answers
    return record


def _simple_answer(choice: Record) -> Record:
    message = choice["message"]
    answer: Record = {
        "text": message["content"],
        "finish_reason": choice["finish_reason"],
    }
    answer |= {name: message[name] for name in _BESIDE_TEXT if name in message}
    if "token_ids" in choice:
        answer["token_ids"] = choice["token_ids"]
    if choice["logprobs"] is not None:
        answer["logprobs"] = choice["logprobs"]["content"]
    return answer

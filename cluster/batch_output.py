"""The output records of a batch job, in the format of the line that asked; no I/O.

Simple lines get `{line, custom_id, text, finish_reason, usage, error}`, OpenAI batch lines the
records of OpenAI's batch output files, plus `line`.
"""

from typing import Any

from .batch_input import CHAT_URL, BadLine, Row, leading_field
from .request import CompletionOutput, Logprob, RequestOutput

Record = dict[str, Any]


def result_record(row: Row, output: RequestOutput, model: str, return_token_ids: bool) -> Record:
    """The record of a row that the engine has finished.

    Args:
        row: what was asked.
        output: the finished output.
        model: the model's name, for OpenAI records.
        return_token_ids: also write the answer's token ids.
    """
    failed = [c.finish_reason for c in output.outputs if c.finish_reason in ("abort", "error")]
    if output.error is not None or failed:
        message = output.error or f"the request ended with the reason {failed[0]!r}"
        return _error(row.line, row.custom_id, row.url, "engine_error", message, None)
    if row.url is not None:
        return _openai_record(row, output, model, return_token_ids)
    return _simple_record(row, output, return_token_ids)


def bad_line_record(bad: BadLine) -> Record:
    """The error record of a line that is not a request."""
    return _error(bad.line, bad.custom_id, bad.url, "invalid_request", bad.message, bad.field)


def rejected_record(row: Row, message: str) -> Record:
    """The error record of a row that the engine did not take."""
    field = leading_field(message)
    return _error(row.line, row.custom_id, row.url, "invalid_request", message, field)


def _error(
    line: int, custom_id: str | None, url: str | None, code: str, message: str, field: str | None
) -> Record:
    record: Record = {"line": line, "custom_id": custom_id}
    if url is None:
        record |= {"text": None, "finish_reason": None, "usage": None}
    else:
        record |= {"id": f"batch_req_{line}", "response": None}
    return {**record, "error": {"code": code, "message": message, "param": field}}


def _usage(output: RequestOutput) -> dict[str, int]:
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(answer.token_ids) for answer in output.outputs),
    }


def _simple_record(row: Row, output: RequestOutput, return_token_ids: bool) -> Record:
    answers = [_simple_answer(row, answer, return_token_ids) for answer in output.outputs]
    record: Record = {"line": row.line, "custom_id": row.custom_id, **answers[0]}
    record |= {"usage": _usage(output), "error": None}
    if len(answers) > 1:
        record["choices"] = answers
    return record


def _simple_answer(row: Row, answer: CompletionOutput, return_token_ids: bool) -> Record:
    record: Record = {"text": answer.text, "finish_reason": answer.finish_reason}
    if return_token_ids:
        record["token_ids"] = list(answer.token_ids)
    if row.request.sampling_params.logprobs is not None:
        record["logprobs"] = _chat_content(answer)
    return record


def _openai_record(row: Row, output: RequestOutput, model: str, return_token_ids: bool) -> Record:
    chat = row.url == CHAT_URL
    usage = _usage(output)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{row.line}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(output.metrics.arrival_time),
        "model": model,
        "choices": [_openai_choice(row, answer, return_token_ids) for answer in output.outputs],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }
    return {
        "id": f"batch_req_{row.line}",
        "line": row.line,
        "custom_id": row.custom_id,
        "response": {"status_code": 200, "request_id": row.request.request_id, "body": body},
        "error": None,
    }


def _openai_choice(row: Row, answer: CompletionOutput, return_token_ids: bool) -> Record:
    choice: Record = {"index": answer.index, "finish_reason": answer.finish_reason}
    wants_logprobs = row.request.sampling_params.logprobs is not None
    if row.url == CHAT_URL:
        choice["message"] = {"role": "assistant", "content": answer.text}
        choice["logprobs"] = {"content": _chat_content(answer)} if wants_logprobs else None
    else:
        choice["text"] = answer.text
        choice["logprobs"] = _completion_logprobs(answer) if wants_logprobs else None
    if return_token_ids:
        choice["token_ids"] = list(answer.token_ids)
    return choice


def _chat_content(answer: CompletionOutput) -> list[Record]:
    """Log-probabilities as chat completions list them: per token, with its best alternatives."""
    content = []
    for token_id, best in zip(answer.token_ids, answer.logprobs or (), strict=True):
        entries = [_chat_entry(i, logprob) for i, logprob in best.items()]
        chosen = next(e for i, e in zip(best, entries, strict=True) if i == token_id)
        ranked = sorted(entries, key=lambda entry: -float(entry["logprob"]))
        content.append({**chosen, "top_logprobs": ranked})
    return content


def _chat_entry(token_id: int, logprob: Logprob) -> Record:
    token = logprob.decoded_token or ""
    return {
        "token": token,
        "token_id": token_id,
        "logprob": logprob.logprob,
        "bytes": list(token.encode()),
    }


def _completion_logprobs(answer: CompletionOutput) -> Record:
    """Log-probabilities as completions list them: parallel lists."""
    content = _chat_content(answer)
    return {
        "tokens": [entry["token"] for entry in content],
        "token_logprobs": [entry["logprob"] for entry in content],
        "top_logprobs": [{e["token"]: e["logprob"] for e in c["top_logprobs"]} for c in content],
    }

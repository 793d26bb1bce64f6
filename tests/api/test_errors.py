"""Bad input costs the request it came in, and the answer names the field."""

from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from support.api_server import MAX_BODY_BYTES, MAX_MODEL_LEN, MODEL
from support.server import Server

HELLO: Any = [{"role": "user", "content": "hello"}]


def error_of(client: OpenAI, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and error of a POST, which must fail, in the shape that the client knows."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.post(path, body=body, cast_to=object)
    error: Any = caught.value.body
    assert set(error) == {"message", "type", "param", "code"}
    return caught.value.status_code, error


COMPLETION_ERRORS: dict[str, tuple[dict[str, Any], str, str]] = {
    "below the range": ({"temperature": -1}, "temperature", "invalid_value"),
    "above the range": ({"top_p": 1.5}, "top_p", "invalid_value"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    "a text for a number": ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
    "a stop that is no text": ({"stop": ["a", 3]}, "stop", "invalid_value"),
    "an empty stop": ({"stop": [""]}, "stop", "invalid_value"),
    "too many stops": ({"stop": ["s"] * 17}, "stop", "limit_exceeded"),
    "too many choices": ({"n": 17}, "n", "limit_exceeded"),
    "too many sequences": ({"n": 9}, "n", "limit_exceeded"),
    "too many logprobs": ({"logprobs": 21}, "logprobs", "limit_exceeded"),
    "too many prompts": ({"prompt": ["a"] * 65}, "prompt", "limit_exceeded"),
    "no prompt": ({"prompt": []}, "prompt", "invalid_value"),
    "an empty prompt": ({"prompt": [""]}, "prompt", "invalid_value"),
    "a prompt of objects": ({"prompt": [{}]}, "prompt", "invalid_value"),
    "a token that is none": ({"prompt": [1, 9999]}, "prompt[1]", "invalid_value"),
    "a bias for no token": ({"logit_bias": {"9999": 1}}, "logit_bias", "invalid_value"),
    "a stop for no token": (
        {"stop_token_ids": [2147483647], "min_tokens": 1},
        "stop_token_ids",
        "invalid_value",
    ),
    "only tokens that are none": (
        {"allowed_token_ids": [9999]},
        "allowed_token_ids",
        "invalid_value",
    ),
    "no token allowed": ({"allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
    "too many bad words": ({"bad_words": ["w"] * 257}, "bad_words", "invalid_value"),
    "an empty bad word": ({"bad_words": [""]}, "bad_words", "invalid_value"),
    "a penalty that is 0 in fp32": (
        {"repetition_penalty": 1e-46},
        "repetition_penalty",
        "invalid_value",
    ),
    "a bias for a word": ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    "an unknown field": ({"top_q": 1}, "top_q", "unknown_parameter"),
    "an unsupported field": ({"use_beam_search": True}, "use_beam_search", "invalid_value"),
    "options without a stream": (
        {"stream_options": {"include_usage": True}},
        "stream_options",
        "invalid_value",
    ),
    "an unknown retention": ({"retention": "magic"}, "retention", "invalid_value"),
    "a retention without budget": (
        {"retention": {"method": "snapkv", "budget": 0}},
        "retention",
        "invalid_value",
    ),
    "a file of the server": (
        {"retention": {"method": "headkv", "budget": 64, "profile": "/etc/hostname"}},
        "retention",
        "invalid_value",
    ),
    "a prompt that is too long": (
        {"prompt": "x" * MAX_MODEL_LEN},
        "prompt",
        "context_length_exceeded",
    ),
    "no room for the answer": (
        {"prompt": "x" * 100, "max_tokens": MAX_MODEL_LEN},
        "max_tokens",
        "context_length_exceeded",
    ),
}


@pytest.mark.parametrize("case", COMPLETION_ERRORS)
def test_a_wrong_completion_is_told_its_field(client: OpenAI, case: str) -> None:
    fields, param, code = COMPLETION_ERRORS[case]
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 4, **fields}
    status, error = error_of(client, "/completions", body)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert param.partition(".")[0] in error["message"]


CHAT_ERRORS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"messages": []}, "messages", "invalid_value"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0]",
        "invalid_value",
    ),
    "tools": ({"tools": [{"type": "function"}]}, "tools[0].function", "invalid_value"),
    "a format": ({"response_format": {"type": "json"}}, "response_format.type", "invalid_value"),
    "top without logprobs": ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    "too many top logprobs": (
        {"logprobs": True, "top_logprobs": 21},
        "top_logprobs",
        "limit_exceeded",
    ),
    "no tokens": ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    "too long": (
        {"messages": [{"role": "user", "content": "x" * MAX_MODEL_LEN}]},
        "messages",
        "context_length_exceeded",
    ),
}


@pytest.mark.parametrize("case", CHAT_ERRORS)
def test_a_wrong_chat_is_told_its_field(client: OpenAI, case: str) -> None:
    fields, param, code = CHAT_ERRORS[case]
    body = {"model": MODEL, "messages": HELLO, **fields}
    status, error = error_of(client, "/chat/completions", body)
    assert (status, error["param"], error["code"]) == (400, param, code)


def test_errors_of_a_stream_come_as_a_status(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * MAX_MODEL_LEN, stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_another_model_is_not_found(client: OpenAI) -> None:
    status, error = error_of(client, "/completions", {"model": "gpt-4", "prompt": "hello"})
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_what_was_started_names_the_model_too(client: OpenAI, byte_model: Path) -> None:
    answer = client.completions.create(model=str(byte_model), prompt="hello", max_tokens=1)
    assert answer.model == MODEL


def test_a_body_that_is_no_json_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not JSON"):
        client.post(
            "/completions",
            content=b'{"model": ',
            options={"headers": {"content-type": "application/json"}},
            cast_to=object,
        )


def test_an_oversized_body_is_refused(client: OpenAI) -> None:
    body = {"model": MODEL, "prompt": "x" * MAX_BODY_BYTES}
    status, error = error_of(client, "/completions", body)
    assert (status, error["code"]) == (413, "request_too_large")
    assert str(MAX_BODY_BYTES) in error["message"]


@pytest.mark.parametrize("key", ["sk-wrong", "sk-test-7c1", "", "other,sk-test-7c1f"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_a_wrong_key_is_refused_before_the_body_is_read(
    server: Server, key: str, path: str
) -> None:
    with OpenAI(base_url=server.url, api_key=key or "-", max_retries=0) as client:
        status, error = error_of(client, path, {"nonsense": True})
    assert (status, error["type"]) == (401, "authentication_error")
    assert error["code"] == "invalid_api_key"


def test_unknown_paths_and_methods_have_the_same_shape(client: OpenAI, server: Server) -> None:
    assert error_of(client, "/embeddings", {})[0] == 404
    assert server.get("/v1/completions")[0] == 405


def test_keys_are_neither_in_the_log_nor_in_the_metrics(client: OpenAI, server: Server) -> None:
    client.models.list()
    assert client.api_key not in server.log.read_text()
    assert client.api_key not in server.get("/metrics")[1]
    assert client.api_key not in server.ray_logs()

"""The bodies that existing clients send by default, and what they read of the answers."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import pytest
from openai.types import (
    batch_create_params,
    completion_create_params,
    responses,
    shared_params,
)
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params, response_input_param
from pydantic import BaseModel
from support.byte_llama import save_tiny_llama
from support.local_server import engine_app, listening
from support.server import fetch

from saqqara.cluster.openai.batches import BatchRequest
from saqqara.cluster.openai.requests import ChatRequest, CompletionRequest
from saqqara.cluster.openai.responses import items, options
from saqqara.cluster.openai.responses.request import ResponseRequest

Json = dict[str, Any]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
ENGINE: Json = {"load_format": "dummy", "dtype": "float32", "device": "cpu", "max_num_seqs": 4}


# What the official client can write, and what reads it.
PARAMS = (
    (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
    (chat_params.CompletionCreateParamsBase, ChatRequest),
    (response_create_params.ResponseCreateParamsBase, ResponseRequest),
    (batch_create_params.BatchCreateParams, BatchRequest),
    (responses.EasyInputMessageParam, items.Message),
    (responses.ResponseOutputMessageParam, items.Message),
    (responses.ResponseFunctionToolCallParam, items.FunctionCall),
    (response_input_param.FunctionCallOutput, items.FunctionCallOutput),
    (responses.ResponseReasoningItemParam, items.Reasoning),
    (responses.FunctionToolParam, options.FunctionTool),
    (responses.ResponseTextConfigParam, options.TextSettings),
    (shared_params.Reasoning, options.Reasoning),
)


@pytest.mark.parametrize(("param", "kind"), PARAMS, ids=lambda kind: kind.__name__)
def test_every_field_of_the_official_client_is_known(param: Any, kind: type[BaseModel]) -> None:
    """It has an effect, or is refused with the reason where it asks for one."""
    known = {field.alias or name for name, field in kind.model_fields.items()}
    assert {*get_type_hints(param)} - known == set()


@dataclass(frozen=True)
class Call:
    """What a client sends. `model` is added."""

    path: str
    body: Mapping[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


CALLS = {
    "openai: a chat": Call(CHAT, {"messages": USER}),
    "openai: a stream": Call(CHAT, {"messages": USER, "stream": True}),
    "openai: a completion": Call(TEXT, {"prompt": "hi"}),
    "LiteLLM: a chat": Call(CHAT, {"messages": USER, "temperature": 0.2, "max_tokens": 5}),
    "LiteLLM: a stream": Call(
        CHAT, {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    ),
    "LiteLLM: its proxy": Call(
        CHAT, {"messages": USER, "user": "default_user_id", "metadata": {"tags": ["a", "b"]}}
    ),
    "LangChain: ChatOpenAI": Call(
        CHAT,
        {"messages": USER, "stream": False, "n": 1, "temperature": 0.7, "max_completion_tokens": 5},
    ),
    "LangChain: ChatOpenAI, a stream": Call(
        CHAT, {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    ),
    "LangChain: OpenAI": Call(
        TEXT,
        {
            "prompt": ["hi", "there"],
            "temperature": 0.7,
            "max_tokens": 5,
            "top_p": 1,
            "n": 1,
            "seed": None,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "logit_bias": {},
            "logprobs": None,
        },
    ),
    "lm-eval: generation": Call(
        TEXT,
        {
            "prompt": [[70, 71, 72]],
            "max_tokens": 5,
            "temperature": 0,
            "stop": ["\n\n", "</s>"],
            "seed": 1234,
        },
    ),
    "lm-eval: loglikelihood": Call(
        TEXT,
        {
            "prompt": [[70, 71, 72, 73], [80, 81]],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    ),
    "lm-eval: a chat": Call(
        CHAT,
        {
            "messages": [{"role": "user", "content": "hi", "type": "text"}],
            "max_tokens": 5,
            "temperature": 0,
            "stop": [],
            "seed": 1234,
        },
    ),
    "vllm bench serve: openai": Call(
        TEXT,
        {
            "prompt": "hi",
            "repetition_penalty": 1.0,
            "max_tokens": 5,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
    ),
    "vllm bench serve: openai with logprobs": Call(
        TEXT,
        {
            "prompt": [70, 71],
            "repetition_penalty": 1.0,
            "max_tokens": 5,
            "logprobs": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
            "top_p": 0.9,
        },
    ),
    "vllm bench serve: openai-chat": Call(
        CHAT,
        {
            "messages": PARTS,
            "max_completion_tokens": 5,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "Open WebUI: a chat": Call(
        CHAT,
        {
            "stream": True,
            "messages": USER,
            "stream_options": {"include_usage": True},
            "metadata": {
                "user_id": "u",
                "chat_id": "c",
                "message_id": "m",
                "session_id": "s",
                "tool_ids": None,
                "files": None,
                "features": {"web_search": False},
                "variables": {"{{USER_NAME}}": "me", "{{CURRENT_DATE}}": "2026-01-01"},
                "model": {"id": "m", "info": {"params": {}, "meta": {"tags": [{"name": "x"}]}}},
            },
        },
    ),
    "Open WebUI: a title": Call(
        CHAT,
        {
            "messages": USER,
            "stream": False,
            "max_completion_tokens": 9,
            "metadata": {"task": "title_generation", "task_body": {"messages": USER}},
        },
    ),
    "Cline": Call(
        CHAT,
        {
            "messages": [{"role": "system", "content": "Be brief."}, *PARTS],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "Continue: a chat": Call(
        CHAT,
        {
            "messages": SYSTEM,
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 1,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "stream": True,
            "stop": ["\n\n\n"],
        },
    ),
    "Continue: autocomplete": Call(
        TEXT,
        {
            "prompt": "def f(",
            "max_tokens": 9,
            "temperature": 0.01,
            "stream": True,
            "stop": ["<fim_prefix>", "<fim_suffix>", "\n\n", "/src/", "#- coding: utf-8", "```"],
        },
    ),
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on a real port."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_llama(folder, max_position=128)
    with listening(engine_app(folder, engine_kwargs={**ENGINE, "kv_memory_gib": 0.01})) as url:
        yield url


def answer(url: str, call: Call) -> list[Json]:
    """The answer, or the events of a stream."""
    got = fetch(url + call.path, "POST", body={"model": "tiny", **call.body})
    assert got.status == 200, got.text
    if not call.streams:
        return [json.loads(got.text)]
    events = [line.removeprefix("data: ") for line in got.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


@pytest.mark.parametrize("name", CALLS)
def test_what_a_client_sends_by_default_is_answered(name: str, url: str) -> None:
    call = CALLS[name]
    pieces = answer(url, call)
    choices = [choice for piece in pieces for choice in piece["choices"]]
    kind = "delta" if call.streams else "message"
    for choice in choices:
        text = choice["text"] if call.path == TEXT else choice[kind]["content"]
        assert isinstance(text, str)
    assert {c["finish_reason"] for c in choices} <= {None, "stop", "length"}
    assert any(choice["finish_reason"] for choice in choices)
    if not call.streams or "stream_options" in call.body:
        usage = pieces[-1]["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 0 < usage["kv_cache"]["kept_bytes"] <= usage["kv_cache"]["full_bytes"]


def test_lm_eval_reads_the_likelihood_of_a_continuation(url: str) -> None:
    """As its `local-completions` does: of the tokens after the context, the last one left out."""
    call = CALLS["lm-eval: loglikelihood"]
    choices = answer(url, call)[0]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    for choice, prompt in zip(choices, call.body["prompt"], strict=True):
        logprobs = choice["logprobs"]
        num_tokens = len(prompt) + 1
        assert [len(logprobs[name]) for name in ("tokens", "text_offset")] == [num_tokens] * 2
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        own, best = logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1]
        assert len(own) == len(best) == len(prompt) - 1
        assert all(value < 0 for value in own)
        for value, top in zip(own, best, strict=True):
            assert value in top.values()
            assert value <= max(top.values())


def test_lm_eval_finds_the_greedy_continuation(url: str) -> None:
    """What greedy decoding writes is the best of every place, value for value."""
    body: Json = {"model": "tiny", "prompt": [70, 71], "max_tokens": 5, "temperature": 0}
    body |= {"return_token_ids": True, "ignore_eos": True}
    [written] = answer(url, Call(TEXT, body))[0]["choices"]
    whole = [*written["prompt_token_ids"], *written["token_ids"]]
    call = Call(TEXT, {**CALLS["lm-eval: loglikelihood"].body, "prompt": [whole]})
    logprobs = answer(url, call)[0]["choices"][0]["logprobs"]
    own, best = logprobs["token_logprobs"][2:-1], logprobs["top_logprobs"][2:-1]
    assert [max(top.values()) for top in best] == own


def test_the_benchmark_of_vllm_counts_what_it_is_sent(url: str) -> None:
    for name in ("vllm bench serve: openai", "vllm bench serve: openai-chat"):
        events = answer(url, CALLS[name])
        assert events[0]["choices"]
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 5
        assert all(event["usage"] is None for event in events[:-1])


def test_an_unknown_field_names_a_near_one_and_a_known_one_says_why(url: str) -> None:
    for field, value, hint in (
        ("max_token", 5, "did you mean 'max_tokens'?"),
        ("suffix", "end", "models here do not fill in the middle"),
        ("top_logprob", 3, "did you mean"),
    ):
        body = {"model": "tiny", "prompt": "hi", field: value}
        got = fetch(url + TEXT, "POST", body=body)
        error = json.loads(got.text)["error"]
        assert (got.status, error["param"]) == (400, field)
        assert hint in error["message"]

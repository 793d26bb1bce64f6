"""A request is answered alike over HTTP, as a line of a batch job, and in Python.

Each body below goes to the ASGI application and, as an OpenAI batch line, to a batch job on an
engine of the same model: both give the same answer, or the same error at the same field.
"""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel
from support.api_server import ENGINE, MODEL
from support.byte_llama import CHAT_TEMPLATE, save_tiny_llama
from support.in_process import InProcessServer

from saqqara import LLM
from saqqara.cluster.batch.job import BatchJob, run_batch
from saqqara.cluster.batch.lines import BadLine, Row, RowParser
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.requests import ChatRequest, CompletionRequest, read_object
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import TokenRequest
from saqqara.configs.schema import ServerLimits

Json = dict[str, Any]

CONTEXT = 128
TEMPLATE = (
    "{% set text = messages[-1].content %}"
    "{% if text == 'zero' %}{{ 1 / 0 }}{% endif %}"
    "{% if text == 'type' %}{{ text + 1 }}{% endif %}"
    "{% if text == 'refuse' %}{{ raise_exception('not this') }}{% endif %}"
    "{% if text == 'endless' or endless is defined %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if mood is defined %}{{ mood }} {% endif %}" + CHAT_TEMPLATE
)
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
MANY_DIGITS = "1" + "0" * 4999


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ApiError, match=r"^'stop' is there twice$") as caught:
        read_object(b'{"prompt": "x", "stop": "a", "stop": "b"}', "the body")
    assert (caught.value.status, caught.value.param) == (400, "stop")


def user(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


@dataclass(frozen=True)
class Case:
    """A body beside its defaults; `param` and `code` are None where it is answered."""

    fields: Json
    param: str | None = None
    code: str | None = None
    is_chat: bool = True

    @property
    def url(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    @property
    def body(self) -> Json:
        prompt: Json = {"messages": user("hi")} if self.is_chat else {"prompt": "hi"}
        body = {"model": MODEL, **prompt, "temperature": 0, "max_tokens": 3, **self.fields}
        return {name: value for name, value in body.items() if value is not ...}


def chat(**fields: Any) -> Case:
    return Case(fields)


def completion(**fields: Any) -> Case:
    return Case(fields, is_chat=False)


def wrong(case: Case, param: str, code: str = "invalid_value") -> Case:
    return Case(case.fields, param, code, case.is_chat)


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A format of OpenAI's."""
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def nested(depth: int) -> Json:
    return {"a": nested(depth - 1)} if depth else {}


CASES: dict[str, Case] = {
    # Answered.
    "chat without max_tokens": chat(max_tokens=...),
    "completion without max_tokens": completion(max_tokens=...),
    "null asks for nothing": chat(
        **dict.fromkeys(
            ("parallel_tool_calls", "reasoning_effort", "tools", "tool_choice", "functions"),
        ),
        **dict.fromkeys(("stop", "logit_bias", "seed", "stream", "stream_options", "metadata")),
        **dict.fromkeys(("retention", "budget", "priority", "n", "top_p", "response_format")),
        **dict.fromkeys(("logprobs", "top_logprobs", "chat_template", "guided_json")),
    ),
    "null in a completion": completion(
        **dict.fromkeys(("suffix", "echo", "best_of", "logprobs", "prompt_logprobs", "user"))
    ),
    "empty asks for nothing": chat(
        **{key: [] for key in ("tools", "functions", "stop", "stop_token_ids", "documents")},
        **{key: {} for key in ("chat_template_kwargs", "logit_bias", "metadata", "retention")},
        **{key: {} for key in ("response_format", "stream_options", "structured_outputs")},
    ),
    "book-keeping": chat(
        store=False,
        service_tier="auto",
        user="me",
        metadata={"run": "7"},
        safety_identifier="x",
        prompt_cache_key="y",
        parallel_tool_calls=True,
    ),
    "values of vLLM that ask for nothing": chat(
        add_generation_prompt=True,
        return_token_ids=False,
        use_beam_search=False,
        length_penalty=1,
        echo=False,
        best_of=1,
        include_reasoning=True,
        spaces_between_special_tokens=True,
        stream_options={"continuous_usage_stats": False},
    ),
    "text as the format": chat(response_format={"type": "text"}, modalities=["text"]),
    "tools that must not be called": chat(tools=[FUNCTION], tool_choice="none"),
    "no top_logprobs": chat(top_logprobs=0),
    "logprobs without top": chat(logprobs=True, top_logprobs=0),
    "top_logprobs": chat(logprobs=True, top_logprobs=3),
    "logprobs of a completion": completion(logprobs=2),
    "both bounds alike": chat(max_tokens=3, max_completion_tokens=3),
    "max_completion_tokens": chat(max_tokens=..., max_completion_tokens=2),
    "one stop string": completion(stop="a", max_tokens=20),
    "a list of stop strings": completion(stop=["b", "c"], max_tokens=20),
    "stop ids": completion(stop_token_ids=[5, 6], min_tokens=1, max_tokens=20),
    "choices with a seed": completion(n=3, seed=5, temperature=1.5),
    "several prompts": completion(prompt=["a", "b", "a"], n=2, seed=5, temperature=1.5),
    "token ids": completion(prompt=[1, 2, 3]),
    "a bias": completion(logit_bias={"7": 100}),
    "penalties": completion(repetition_penalty=1.3, presence_penalty=1, frequency_penalty=-0.5),
    "filters": completion(top_k=5, top_p=0.9, min_p=0.1, seed=1, temperature=1),
    "an echo": completion(echo=True),
    "an echo of token ids": completion(prompt=[70, 71, 72], echo=True, logprobs=1),
    "an echo with logprobs": completion(echo=True, logprobs=2, max_tokens=1),
    "an echo alone": completion(echo=True, logprobs=0, max_tokens=0),
    "an echo of one token": completion(prompt=[70], echo=True, logprobs=3),
    "an echo of several": completion(prompt=["ab", "cde"], n=2, echo=True, logprobs=1),
    "logprobs of the prompt": completion(prompt_logprobs=2),
    "logprobs of messages": chat(prompt_logprobs=1),
    "ids in the answer": completion(return_token_ids=True),
    "ids in the answer of a chat": chat(return_token_ids=True, logprobs=True, top_logprobs=1),
    "tokens as ids": completion(logprobs=2, return_tokens_as_token_ids=True),
    "tokens of a chat as ids": chat(logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True),
    "a best of three": completion(best_of=3, seed=5, temperature=1.5),
    "two of the best of three": completion(n=2, best_of=3, seed=5, temperature=1.5, logprobs=1),
    "the beginning of a prompt": completion(
        prompt="abcdef", truncate_prompt_tokens=3, truncation_side="right", echo=True
    ),
    "a prompt without special tokens": completion(add_special_tokens=False, echo=True),
    "a chat with special tokens": chat(add_special_tokens=True, return_token_ids=True),
    "what vLLM's own client may say": completion(
        logprob_token_ids=None,
        repetition_detection=None,
        return_token_offsets=False,
        stream_interval=1,
        thinking_token_budget=-1,
        watermarking=False,
        ec_transfer_params=None,
        session_id="s",
    ),
    "a moderated answer": wrong(chat(moderation={"model": "m"}), "moderation"),
    "a bound on thoughts": wrong(chat(thinking_token_budget=5), "thinking_token_budget"),
    "nested metadata": chat(metadata={"variables": {"{{USER}}": "me"}, "files": [{"a": [1]}]}),
    "text parts": chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]),
    "a truncated prompt": completion(prompt="x" * 500, truncate_prompt_tokens=-1),
    "a retention": completion(prompt="x" * 100, retention="streaming", budget=40),
    "allowed tokens": completion(allowed_token_ids=[70, 71, 72]),
    "bad words": completion(bad_words=["a", "b c"]),
    "a priority": completion(priority=-5),
    "a choice": completion(structured_outputs={"choice": ["a", "bc"]}),
    "any object": chat(response_format={"type": "json_object"}),
    "a schema": chat(response_format=of_schema({"enum": [1, 22, "a"]}), max_tokens=20),
    "a variable of the template": chat(chat_template_kwargs={"mood": "calm"}),
    "a message that goes on": chat(
        messages=[*user("hi"), {"role": "assistant", "content": "Well"}],
        continue_final_message=True,
    ),
    "no head of an answer": chat(add_generation_prompt=False),
    "a salt": completion(cache_salt="mine"),
    # Refused.
    "a long salt": wrong(chat(cache_salt="x" * 257), "cache_salt"),
    "a conversation with a blank": wrong(chat(conversation_id="a b"), "conversation_id"),
    "a conversation that is a way up": wrong(chat(conversation_id=".."), "conversation_id"),
    "two choices of a turn": wrong(chat(conversation_id="a", n=2), "n"),
    "the best turn": wrong(chat(conversation_id="a", best_of=2), "best_of"),
    "logprobs of a turn's prompt": wrong(
        chat(conversation_id="a", prompt_logprobs=1), "prompt_logprobs"
    ),
    "an echo of a turn": wrong(completion(conversation_id="a", echo=True, logprobs=1), "echo"),
    "both bounds": wrong(chat(max_completion_tokens=4), "max_tokens"),
    "a bound beyond the context": wrong(
        chat(max_tokens=CONTEXT), "max_tokens", "context_length_exceeded"
    ),
    "another bound beyond the context": wrong(
        chat(max_tokens=..., max_completion_tokens=CONTEXT),
        "max_completion_tokens",
        "context_length_exceeded",
    ),
    "a prompt beyond the context": wrong(
        completion(prompt="x" * CONTEXT), "prompt", "context_length_exceeded"
    ),
    "messages beyond the context": wrong(
        chat(messages=user("x" * CONTEXT)), "messages", "context_length_exceeded"
    ),
    "no tokens": wrong(chat(max_tokens=..., max_completion_tokens=0), "max_completion_tokens"),
    "a number as prompt": wrong(completion(prompt=5), "prompt"),
    "a mixed prompt": wrong(completion(prompt=[1, "2"]), "prompt"),
    "an empty prompt": wrong(completion(prompt=""), "prompt"),
    "no prompt": wrong(completion(prompt=...), "prompt"),
    "a token that is none": wrong(completion(prompt=[1, 9999]), "prompt[1]"),
    "a text for a number": wrong(completion(temperature="1"), "temperature"),
    "below the range": wrong(completion(temperature=-1), "temperature"),
    "above the range": wrong(completion(top_p=1.5), "top_p"),
    "a penalty of 0 in fp32": wrong(completion(repetition_penalty=1e-46), "repetition_penalty"),
    "a stop id beyond the vocabulary": wrong(
        completion(min_tokens=1, stop_token_ids=[2**31 - 1]), "stop_token_ids"
    ),
    "an allowed token that is none": wrong(
        completion(allowed_token_ids=[257]), "allowed_token_ids"
    ),
    "no allowed token": wrong(completion(allowed_token_ids=[]), "allowed_token_ids"),
    "a bad word that is none": wrong(completion(bad_words=[""]), "bad_words"),
    "a negative stop id": wrong(completion(stop_token_ids=[-1]), "stop_token_ids[0]"),
    "more choices than there are": wrong(completion(n=10**30), "n", "limit_exceeded"),
    "a seed of many digits": wrong(completion(seed=10**30), "seed"),
    "more tokens than there are": wrong(completion(max_tokens=10**30), "max_tokens"),
    "an unknown field": wrong(chat(temprature=1), "temprature", "unknown_parameter"),
    "a bias of many digits": wrong(completion(logit_bias={MANY_DIGITS: 1}), "logit_bias"),
    "a bias given twice": wrong(completion(logit_bias={"7": 1, "07": 2}), "logit_bias"),
    "a bias for a word": wrong(completion(logit_bias={"x": 1}), "logit_bias"),
    "a bias for no token": wrong(completion(logit_bias={"9999": 1}), "logit_bias"),
    "a priority beyond any": wrong(completion(priority=2**40), "priority"),
    "a retention that is a number": wrong(completion(retention=3), "retention"),
    "an unknown retention": wrong(completion(retention="magic"), "retention"),
    "a budget that is none": wrong(completion(retention="snapkv", budget="x"), "budget"),
    "min above max": wrong(completion(min_tokens=9), "min_tokens"),
    "too many logprobs": wrong(
        chat(logprobs=True, top_logprobs=21), "top_logprobs", "limit_exceeded"
    ),
    "top without logprobs": wrong(chat(top_logprobs=2), "top_logprobs"),
    "no messages": wrong(chat(messages=[]), "messages"),
    "no content": wrong(chat(messages=[{"role": "user"}]), "messages[0].content"),
    "an image": wrong(
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "messages[0].content[0]",
    ),
    "tools": wrong(chat(tools=[FUNCTION]), "tools"),
    "tools to be called": wrong(chat(tools=[FUNCTION], tool_choice="required"), "tools"),
    "a format": wrong(chat(response_format={"type": "json"}), "response_format.type"),
    "a schema without a name": wrong(
        chat(response_format={"type": "json_schema", "json_schema": {"schema": {}}}),
        "response_format.json_schema.name",
    ),
    "no schema": wrong(chat(response_format={"type": "json_schema"}), "response_format"),
    "a schema for text": wrong(
        chat(response_format={"type": "text", "json_schema": {"name": "a", "schema": {}}}),
        "response_format",
    ),
    "a keyword that is not supported": wrong(
        chat(response_format=of_schema({"items": {"not": {}}})), "response_format"
    ),
    "two forms": wrong(
        chat(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}),
        "structured_outputs",
    ),
    "two kinds": wrong(
        completion(structured_outputs={"regex": "a", "choice": ["b"]}), "structured_outputs"
    ),
    "a broken expression": wrong(
        completion(structured_outputs={"regex": "("}), "structured_outputs"
    ),
    "a choice that is empty": wrong(
        completion(structured_outputs={"choice": ["a", ""]}), "structured_outputs.choice[1]"
    ),
    "a kind that is none": wrong(
        completion(structured_outputs={"xml": 1}), "structured_outputs.xml"
    ),
    "a form that leaves no token": wrong(
        completion(structured_outputs={"choice": ["b"]}, allowed_token_ids=[70]),
        "structured_outputs",
        "constraint_failed",
    ),
    "one that was a format": wrong(
        chat(response_format=of_schema({"const": "b"}), allowed_token_ids=[70]),
        "response_format",
        "constraint_failed",
    ),
    "a stored answer": wrong(chat(store=True), "store"),
    "an effort": wrong(chat(reasoning_effort="high"), "reasoning_effort"),
    "an earlier name": wrong(chat(guided_regex="a+"), "guided_regex"),
    "a beam": wrong(completion(use_beam_search=True), "use_beam_search"),
    "an echo after a propagation": wrong(
        completion(echo=True, logprobs=1, retention="pyramidinfer"), "echo"
    ),
    "logprobs of the prompt after a propagation": wrong(
        completion(prompt_logprobs=1, retention="pyramidinfer"), "prompt_logprobs"
    ),
    "an echo in a chat": wrong(chat(echo=True), "echo"),
    "no tokens without an echo": wrong(completion(max_tokens=0), "max_tokens"),
    "a best of fewer": wrong(completion(n=3, best_of=2), "best_of"),
    "a best of many": wrong(completion(best_of=200), "best_of", "limit_exceeded"),
    "all logprobs of the prompt": wrong(completion(prompt_logprobs=-1), "prompt_logprobs"),
    "too many logprobs of the prompt": wrong(
        chat(prompt_logprobs=21), "prompt_logprobs", "limit_exceeded"
    ),
    "another side": wrong(completion(truncation_side="middle"), "truncation_side"),
    "a suffix": wrong(completion(suffix="the end"), "suffix"),
    "deep metadata": wrong(chat(metadata=nested(20)), "metadata"),
    "much metadata": wrong(chat(metadata={str(i): i for i in range(2000)}), "metadata"),
    "another template": wrong(chat(chat_template="{{ 1 }}"), "chat_template"),
    "a setting as a variable": wrong(
        chat(chat_template_kwargs={"tokenize": False}), "chat_template_kwargs"
    ),
    "to begin and to go on": wrong(
        chat(continue_final_message=True, add_generation_prompt=True), "continue_final_message"
    ),
    "usage without a stream": wrong(
        completion(stream_options={"include_usage": True}), "stream_options"
    ),
    "a template that divides by zero": wrong(chat(messages=user("zero")), "messages"),
    "a template that mixes types": wrong(chat(messages=user("type")), "messages"),
    "a template that refuses": wrong(chat(messages=user("refuse")), "messages"),
    "a template without an end": wrong(chat(messages=user("endless")), "messages"),
    "a variable without an end": wrong(chat(chat_template_kwargs={"endless": 1}), "messages"),
    "another model": wrong(completion(model="gpt-4"), "model", "model_not_found"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes whose template fails on some words."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    save_tiny_llama(folder, max_position=CONTEXT, chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def over_http(model: Path) -> dict[str, tuple[int, Json]]:
    """Status and body of the answer to each case."""

    async def ask() -> dict[str, tuple[int, Json]]:
        server = InProcessServer(model, prefix_caching=False)
        answers = {name: await server.post(case.url, case.body) for name, case in CASES.items()}
        await server.generation.shutdown()
        return answers

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), prefix_caching=False, **ENGINE) as llm:
        yield llm


@pytest.fixture(scope="module")
def as_lines(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    """The record of each case; one batch job runs them all."""
    lines = [
        {"custom_id": name, "method": "POST", "url": case.url, "body": case.body}
        for name, case in CASES.items()
    ]
    return run_lines(llm, lines, tmp_path_factory.mktemp("job"))


def run_lines(llm: LLM, lines: list[Json], folder: Path, **sampling: Any) -> dict[str, Json]:
    """The records of a batch job by `custom_id`."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = BatchJob(source, output, llm.config, SamplingParams(**sampling))
    assert run_batch(job, llm._client).complete
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == len(lines)
    return {record["custom_id"]: record for record in records}


def rounded(value: Any) -> Any:
    """The same with numbers that do not depend on which sequences share a step."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value


@pytest.mark.parametrize("name", CASES)
def test_http_and_batch_lines_answer_alike(
    name: str, over_http: dict[str, tuple[int, Json]], as_lines: dict[str, Json]
) -> None:
    case = CASES[name]
    status, body = over_http[name]
    record = as_lines[name]
    if case.param is None:
        assert status == 200, body
        assert record["error"] is None, record["error"]
        reply = record["response"]["body"]
        assert reply.keys() == body.keys()
        for usage in (reply["usage"], body["usage"]):
            del usage["prompt_tokens_details"]  # which comes first is cached for the other
        assert reply["usage"] == body["usage"]
        assert rounded(reply["choices"]) == rounded(body["choices"])
        return
    error = body["error"]
    assert status == (404 if case.code == "model_not_found" else 400)
    assert (error["param"], error["code"]) == (case.param, case.code), error
    assert record["error"].keys() == error.keys()
    # What there is, and how much of it, may differ between a server and a job.
    assert record["error"] == error or case.code in ("model_not_found", "limit_exceeded")
    assert error["message"].startswith(case.param.partition(".")[0].partition("[")[0]), error


def test_the_answers_are_what_was_asked_for(over_http: dict[str, tuple[int, Json]]) -> None:
    def usage(name: str) -> tuple[int, int]:
        body = over_http[name][1]["usage"]
        return body["prompt_tokens"], body["completion_tokens"]

    chat_tokens = len("user: hi\nassistant: ")
    assert sum(usage("chat without max_tokens")) == CONTEXT, "a chat runs up to the context"
    assert usage("completion without max_tokens") == (2, 16), "OpenAI's default"
    assert usage("a variable of the template") == (len("calm ") + chat_tokens, 3)
    assert usage("a message that goes on") == (len("user: hi\nassistant: Well"), 3)
    assert usage("no head of an answer") == (len("user: hi\n"), 3)
    assert usage("a truncated prompt") == (CONTEXT - 3, 3)
    assert usage("max_completion_tokens") == (chat_tokens, 2)
    several = [c["text"] for c in over_http["several prompts"][1]["choices"]]
    assert len(set(several)) == 6, "equal prompts have random numbers of their own"


def test_settings_of_a_job_are_those_of_lines_without_their_own(llm: LLM, tmp_path: Path) -> None:
    chat_line = {"method": "POST", "url": "/v1/chat/completions"}
    lines: list[Json] = [
        {"custom_id": "chat", **chat_line, "body": {"messages": user("hi")}},
        {"custom_id": "own", **chat_line, "body": {"messages": user("hi"), "max_tokens": 2}},
        {"custom_id": "null", "prompt": "hi", "max_tokens": None},
        {"custom_id": "simple", "prompt": "hi", "stop_token_ids": [100], "max_tokens": 2},
        {"custom_id": "ids", "prompt_token_ids": [1, 999]},
        {"custom_id": "long", "prompt_token_ids": [1] * CONTEXT},
        {"custom_id": "logprobs", "messages": user("hi"), "logprobs": 2},
        {"custom_id": "one of two", "prompt": ["hi", "x" * CONTEXT]},
    ]
    records = run_lines(llm, lines, tmp_path, max_tokens=5, temperature=0, ignore_eos=True)
    tokens = {
        name: record.get("response", {"body": record})["body"]["usage"]["completion_tokens"]
        for name, record in records.items()
        if record["error"] is None
    }
    assert tokens == {"chat": 5, "own": 2, "null": 5, "simple": 2, "logprobs": 5}
    assert [len(entry["top_logprobs"]) for entry in records["logprobs"]["logprobs"]] == [2] * 5
    errors = {name: r["error"]["param"] for name, r in records.items() if r["error"] is not None}
    assert errors == {
        "ids": "prompt_token_ids[1]",
        "long": "prompt_token_ids",
        "one of two": "prompt",
    }


@pytest.mark.parametrize("word", ["zero", "type", "refuse", "endless"])
def test_a_template_that_fails_is_a_value_error_in_python(llm: LLM, word: str) -> None:
    with pytest.raises(ValueError, match=r"messages\[0\]: messages: the model's chat template"):
        llm.chat(user(word))
    assert llm.chat(user("hi"), SamplingParams(max_tokens=2))[0].finished


def test_a_fault_with_one_row_is_its_error_record(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode

    def fail(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        if text == "odd":
            raise TypeError("TextInputSequence must be str")
        return encode(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", fail)
    lines: list[Json] = [{"custom_id": word, "prompt": word} for word in ("odd", "even")]
    records = run_lines(llm, lines, tmp_path, max_tokens=1)
    assert records["odd"]["error"]["message"] == "TypeError: TextInputSequence must be str"
    assert records["even"]["error"] is None


def test_tokenize_writes_a_chat_as_a_chat_is_answered(model: Path) -> None:
    async def count(**body: Any) -> Any:
        status, answer = await server.post("/tokenize", body)
        return answer["count"] if status == 200 else answer["error"]["param"]

    async def counts() -> list[Any]:
        answers = [
            await count(messages=user("hi"), add_generation_prompt=False),
            await count(messages=user("hi"), chat_template_kwargs={"mood": "calm"}),
            await count(messages=user("hi"), chat_template_kwargs={"tokenize": True}),
            await count(messages=user("zero")),
        ]
        await server.generation.shutdown()
        return answers

    server = InProcessServer(model)
    assert asyncio.run(counts()) == [9, 25, "chat_template_kwargs", "messages"]


def test_a_priority_reaches_the_scheduler(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    priorities: dict[str, int] = {}
    check = Scheduler.check

    def note(scheduler: Scheduler, request: TokenRequest) -> None:
        priorities[request.request_id] = request.priority
        check(scheduler, request)

    async def ask() -> None:
        server = InProcessServer(model)
        for case in (CASES["a priority"], CASES["a bias"]):
            assert (await server.post(case.url, case.body))[0] == 200
        await server.generation.shutdown()

    monkeypatch.setattr(Scheduler, "check", note)
    asyncio.run(ask())
    assert list(priorities.values()) == [-5, 0]
    row = RowParser("tiny", {}).parse(1, json.dumps({"prompt": "hi", "priority": 7}))
    assert isinstance(row, Row)
    assert row.requests[0].priority == 7


FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["full", "snapkv", "25%", "text", "none", "hi"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), is_chat=st.booleans())
def test_no_line_raises(fields: Json, is_chat: bool) -> None:
    """Whatever the values of its fields are, a line is a row or says what is wrong."""
    prompt: Json = {"messages": user("hi")} if is_chat else {"prompt": "hi"}
    row = RowParser("tiny", {}).parse(1, json.dumps({**prompt, **fields}))
    if isinstance(row, BadLine):
        assert row.code != "server_error", row
        assert row.field, row


@pytest.mark.parametrize(
    ("kind", "params"),
    [(ChatRequest, chat_params), (CompletionRequest, completion_params)],
)
def test_every_field_of_the_official_client_is_known(kind: type[BaseModel], params: Any) -> None:
    """It is taken, or refused with a reason: none is an unknown field."""
    assert {*params.CompletionCreateParamsBase.__annotations__} - {*kind.model_fields} == set()


def test_simple_lines_show_what_they_ask_of_the_prompt(llm: LLM, tmp_path: Path) -> None:
    lines: list[Json] = [
        {"custom_id": "scored", "prompt": "ab", "prompt_logprobs": 0, "return_token_ids": True},
        {"custom_id": "echoed", "prompt_token_ids": [70, 71, 72], "echo": True, "logprobs": 1},
        {"custom_id": "plain", "prompt": "ab"},
    ]
    records = run_lines(llm, lines, tmp_path)
    ids = records["scored"]["prompt_token_ids"]
    [nothing, entry] = records["scored"]["prompt_logprobs"]
    assert nothing is None
    assert [*entry] == [str(ids[1])]
    assert entry[str(ids[1])]["decoded_token"] == "b"
    echoed = records["echoed"]
    assert [entry and next(iter(entry)) for entry in echoed["prompt_logprobs"]] == [
        None,
        "71",
        "72",
    ]
    assert echoed["text"].startswith("fgh")
    assert "prompt_logprobs" not in records["plain"]
    kept = records["plain"]["usage"]["kv_cache"]
    assert 0 < kept["kept_tokens"] == kept["full_tokens"]


def test_a_server_may_bound_how_far_ahead_requests_go() -> None:
    def ask(priority: int | None) -> None:
        fields = {"model": "m", "prompt": "a", "priority": priority}
        CompletionRequest.model_validate(fields).check_limits(ServerLimits(min_priority=0))

    for allowed in (None, 0, 7):
        ask(allowed)
    with pytest.raises(ApiError, match="at least 0 here, not -1") as caught:
        ask(-1)
    assert (caught.value.param, caught.value.code) == ("priority", "limit_exceeded")


@pytest.mark.parametrize("named", ["auto", "SmolLM2-135M-Instruct", {"0-0": [1.0]}])
def test_a_client_may_name_the_profile_that_was_measured(named: Any) -> None:
    retention = {"method": "headkv", "budget": "25%", "profile": named}
    fields = {"model": "m", "prompt": "x", "retention": retention}
    CompletionRequest.model_validate(fields).check_profile()


def test_a_client_may_name_no_file() -> None:
    retention = {"method": "headkv", "budget": "25%", "profile": "/etc/passwd"}
    fields = {"model": "m", "prompt": "x", "retention": retention}
    request = CompletionRequest.model_validate(fields)
    with pytest.raises(ApiError, match=r"profile must be one of \['auto', 'SmolLM2-135M-Instruct'"):
        request.check_profile()

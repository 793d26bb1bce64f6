"""The official Python client."""

import json
from typing import Any

import openai
from checks import API_KEY, BASE_URL, MODEL, expect, run
from pydantic import BaseModel

client: Any = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key=API_KEY, max_retries=0, timeout=120)
MESSAGES = [{"role": "user", "content": "Where is the oldest step pyramid?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up.",
        "parameters": {
            "type": "object",
            "properties": {"page": {"enum": ["map", "index"]}},
            "required": ["page"],
            "additionalProperties": False,
        },
    },
}


class Place(BaseModel):
    """An answer with a fixed form."""

    is_old: bool
    where: str


def models() -> None:
    assert MODEL in [model.id for model in client.models.list()]


def chat() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert 0 < answer.usage.completion_tokens <= 12
    total = answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.total_tokens == total


def chat_stream_is_the_chat() -> None:
    fixed = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**fixed).choices[0].message.content
    stream = client.chat.completions.create(
        **fixed, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == whole, (text, whole)
    assert len(chunks) > 3
    assert chunks[-1].usage.completion_tokens > 0


def completion_with_logprobs() -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Saqqara is", max_tokens=5, logprobs=2, n=2, temperature=1, seed=1
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)


def completion_with_echo() -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Saqqara is", max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith("Saqqara is")
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset)


def retention_of_a_request() -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "stone " * 100}],
        max_tokens=4,
        extra_body={"retention": "pyramidkv", "budget": "25%"},
    )
    cache = answer.usage.model_extra["kv_cache"]
    assert 0 < cache["kept_tokens"] < cache["full_tokens"]


def tools_required() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=200
    )
    [call, *_] = answer.choices[0].message.tool_calls
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments)["page"] in ("map", "index")


def tools_streamed() -> None:
    named = {"type": "function", "function": {"name": "look_up"}}
    name = arguments = ""
    for chunk in client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice=named, max_tokens=200, stream=True
    ):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    assert name == "look_up"
    assert json.loads(arguments)["page"] in ("map", "index")


def parsed_json_schema() -> None:
    schema = Place.model_json_schema()
    schema["properties"]["where"]["maxLength"] = 8
    form = {"name": "Place", "schema": schema, "strict": False}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": form},
    )
    Place.model_validate_json(answer.choices[0].message.content)


def responses() -> None:
    answer = client.responses.create(model=MODEL, input="Hello", max_output_tokens=16, store=False)
    assert answer.output_text
    kinds = [
        event.type
        for event in client.responses.create(
            model=MODEL, input="Hello", max_output_tokens=16, store=False, stream=True
        )
    ]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


def files_and_batches() -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    content = json.dumps(line).encode()
    given = client.files.create(file=("lines.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=given.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    answer = json.loads(client.files.content(batch.output_file_id).text)
    assert answer["custom_id"] == "a"
    assert answer["response"]["status_code"] == 200


def errors_have_their_types() -> None:
    chats = client.chat.completions
    stranger = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="wrong", max_retries=0)
    expect(
        openai.BadRequestError,
        lambda: chats.create(model=MODEL, messages=MESSAGES, temperature=-1),
    )
    expect(openai.NotFoundError, lambda: chats.create(model="no-such-model", messages=MESSAGES))
    expect(openai.AuthenticationError, stranger.models.list)


if __name__ == "__main__":
    run(
        models,
        chat,
        chat_stream_is_the_chat,
        completion_with_logprobs,
        completion_with_echo,
        retention_of_a_request,
        tools_required,
        tools_streamed,
        parsed_json_schema,
        responses,
        files_and_batches,
        errors_have_their_types,
    )

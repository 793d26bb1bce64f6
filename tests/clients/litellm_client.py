"""LiteLLM, as a router between providers uses the server: `openai/MODEL` at an address."""

import asyncio
import json

import litellm
from checks import API_KEY, BASE_URL, MODEL, expect, run

COMMON = {
    "model": f"openai/{MODEL}",
    "api_base": f"{BASE_URL}/v1",
    "api_key": API_KEY,
    "messages": [{"role": "user", "content": "Where is the oldest step pyramid?"}],
    "num_retries": 0,
    "timeout": 120,
}


def chat() -> None:
    answer = litellm.completion(**COMMON, max_tokens=12)
    assert answer.choices[0].message.content
    assert 0 < answer.usage.completion_tokens <= 12


def chat_stream_is_the_chat() -> None:
    whole = litellm.completion(**COMMON, max_tokens=24, temperature=0)
    stream = litellm.completion(**COMMON, max_tokens=24, temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content


def chat_async() -> None:
    answer = asyncio.run(litellm.acompletion(**COMMON, max_tokens=4))
    assert answer.choices[0].finish_reason in ("length", "stop")


def text_completion() -> None:
    common = {name: value for name, value in COMMON.items() if name != "messages"}
    common["model"] = f"text-completion-openai/{MODEL}"
    answer = litellm.text_completion(**common, prompt="Saqqara is", max_tokens=5)
    assert answer.usage.completion_tokens <= 5


def tools_required() -> None:
    parameters = {
        "type": "object",
        "properties": {"page": {"enum": ["map", "index"]}},
        "required": ["page"],
    }
    tool = {"type": "function", "function": {"name": "look_up", "parameters": parameters}}
    answer = litellm.completion(**COMMON, tools=[tool], tool_choice="required", max_tokens=200)
    [call, *_] = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["page"] in ("map", "index")


def errors_have_their_types() -> None:
    expect(litellm.BadRequestError, lambda: litellm.completion(**COMMON, temperature=-1))


if __name__ == "__main__":
    run(
        chat,
        chat_stream_is_the_chat,
        chat_async,
        text_completion,
        tools_required,
        errors_have_their_types,
    )

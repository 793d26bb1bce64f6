"""LangChain's `ChatOpenAI` and `OpenAI`, with its own default fields."""

from typing import Literal

from checks import API_KEY, BASE_URL, MODEL, run
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

COMMON = {"base_url": f"{BASE_URL}/v1", "api_key": API_KEY, "model": MODEL, "max_retries": 0}
QUESTION = [SystemMessage("Be brief."), HumanMessage("Where is the oldest step pyramid?")]


@tool
def look_up(page: Literal["map", "index"]) -> str:
    """Look something up."""
    return page


class Verdict(BaseModel):
    """What is thought of a place."""

    is_old: bool
    kind: Literal["tomb", "temple"]


def chat() -> None:
    answer = ChatOpenAI(**COMMON, max_tokens=12).invoke(QUESTION)
    assert answer.content
    assert 0 < answer.usage_metadata["output_tokens"] <= 12


def chat_stream_is_the_chat() -> None:
    model = ChatOpenAI(**COMMON, max_tokens=24, temperature=0)
    chunks = list(model.stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == model.invoke(QUESTION).content
    assert len(chunks) > 3


def chats_at_once() -> None:
    answers = ChatOpenAI(**COMMON, max_tokens=4).batch([QUESTION] * 3)
    assert len(answers) == 3


def completion() -> None:
    assert OpenAI(**COMMON, max_tokens=5).invoke("Saqqara is")


def tools_required_and_answered() -> None:
    model = ChatOpenAI(**COMMON, max_tokens=200).bind_tools([look_up], tool_choice="any")
    answer = model.invoke(QUESTION)
    [call, *_] = answer.tool_calls
    assert call["name"] == "look_up"
    assert call["args"]["page"] in ("map", "index")
    result = ToolMessage(look_up.invoke(call["args"]), tool_call_id=call["id"])
    said = AIMessage(answer.content, tool_calls=[call])
    again = ChatOpenAI(**COMMON, max_tokens=8).invoke([*QUESTION, said, result])
    assert again.usage_metadata["output_tokens"] > 0


def tools_streamed() -> None:
    model = ChatOpenAI(**COMMON, max_tokens=200).bind_tools([look_up], tool_choice="look_up")
    first, *others = model.stream(QUESTION)
    for chunk in others:
        first += chunk
    assert first.tool_calls[0]["args"]["page"] in ("map", "index")


def structured_output_by_schema() -> None:
    model = ChatOpenAI(**COMMON, max_tokens=200)
    found = model.with_structured_output(Verdict, method="json_schema").invoke(QUESTION)
    assert isinstance(found, Verdict)


def structured_output_by_tool() -> None:
    model = ChatOpenAI(**COMMON, max_tokens=200)
    found = model.with_structured_output(Verdict, method="function_calling").invoke(QUESTION)
    assert isinstance(found, Verdict)


if __name__ == "__main__":
    run(
        chat,
        chat_stream_is_the_chat,
        chats_at_once,
        completion,
        tools_required_and_answered,
        tools_streamed,
        structured_output_by_schema,
        structured_output_by_tool,
    )

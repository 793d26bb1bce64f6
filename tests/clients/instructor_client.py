"""Instructor, which validates answers with pydantic, in the modes that it has for OpenAI's API."""

from typing import Literal

import instructor
from checks import API_KEY, BASE_URL, MODEL, run
from openai import OpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
    """What is thought of a place."""

    is_old: bool
    kind: Literal["tomb", "temple"]


def _ask(mode: instructor.Mode) -> None:
    inner = OpenAI(base_url=f"{BASE_URL}/v1", api_key=API_KEY, max_retries=0, timeout=120)
    client = instructor.from_openai(inner, mode=mode)
    found = client.chat.completions.create(
        model=MODEL,
        response_model=Verdict,
        messages=[{"role": "user", "content": "What is at Saqqara?"}],
        max_tokens=200,
        max_retries=0,
    )
    assert isinstance(found, Verdict)


def tools() -> None:
    _ask(instructor.Mode.TOOLS)


def json_schema() -> None:
    _ask(instructor.Mode.JSON_SCHEMA)


def tools_strict() -> None:
    _ask(instructor.Mode.TOOLS_STRICT)


if __name__ == "__main__":
    run(tools, json_schema, tools_strict)

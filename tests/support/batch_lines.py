"""Lines of the input of a batch, as clients of OpenAI write them."""

import io
import json
from collections.abc import Iterable
from typing import Any

from .api_server import MODEL

ENDED = ("completed", "failed", "expired", "cancelled")


def chat_line(custom_id: str, text: str = "hello", url: str | None = None, **body: Any) -> Any:
    """A line of an input."""
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": url or "/v1/chat/completions",
        "body": {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 4,
            "temperature": 0,
            **body,
        },
    }


def completion_line(custom_id: str, prompt: Any = "hello", **body: Any) -> Any:
    """A line of an input."""
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0, **body},
    }


def jsonl(lines: Iterable[Any]) -> bytes:
    """Lines as a file."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def named(content: bytes, name: str = "in.jsonl") -> tuple[str, io.BytesIO]:
    """What the official client takes as a file."""
    return name, io.BytesIO(content)

"""What the runners share: requests as JSON lines on stdin, replies as JSON lines on stdout.

A runner loads its engine once and says so with `{"ready": true, "load_seconds": ..., ...}`. Then it
answers each line

    {"prompts": [[token ids], ...], "new_tokens": n}

with

    {"wall_seconds": s, "prefill_seconds": s, "output_token_ids": [[token ids], ...],
     "preemptions": n, "first_token_seconds": [s, ...], "cached_tokens": n}

until stdin ends; the last three are null where an engine does not tell. A failed request is
answered with `{"error": "..."}`. Whatever else a library prints goes to stderr. This file and the
runners run under the Python of a peer's environment, so they import nothing of Saqqara (but its
own does).
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol

Prompts = Sequence[Sequence[int]]


@dataclass
class Answers:
    """Greedy answers to all prompts of one request, in their order.

    `prefill_seconds`: from the start of the request until all prompts have their first token.
    `preemptions`: how often a prompt lost its keys and values to others, and started again; None
    where the engine does not tell. So are `first_token_seconds`, of each prompt from the start of
    the request, and `cached_tokens` of all prompts, which were not computed.
    """

    token_ids: list[list[int]]
    prefill_seconds: float
    preemptions: int | None = None
    first_token_seconds: list[float] | None = None
    cached_tokens: int | None = None


class Engine(Protocol):
    """A loaded engine."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it runs with, for the report."""
        ...

    def prepare(self, prompts: Prompts, new_tokens: int) -> None:
        """What depends on the lengths and is not timed."""
        ...

    def generate(self, prompts: Prompts, new_tokens: int) -> Answers:
        """Answer all prompts with exactly `new_tokens` tokens each, greedily."""
        ...


@dataclass
class Clock:
    """Seconds since its making, and when each of `waiting` first tokens came."""

    waiting: int = 1
    start: float = field(default_factory=time.perf_counter)
    last_first_token: float = 0.0

    def first_token(self) -> None:
        """Count a first token that has just come."""
        if self.waiting > 0:
            self.waiting -= 1
            self.last_first_token = time.perf_counter() - self.start


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every runner takes."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--model", required=True, help="folder of a Hugging Face model")
    result.add_argument("--threads", type=int, required=True, help="CPU threads")
    result.add_argument("--cache", required=True, help="folder for converted models")
    return result


def serve(load: Callable[[], Engine], packages: Sequence[str]) -> None:
    """Load an engine and answer requests until stdin ends.

    Args:
        load: makes the engine.
        packages: distributions whose versions are told.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of libraries

    def reply(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    start = time.perf_counter()
    try:
        engine = load()
    except Exception as error:
        traceback.print_exc()
        reply({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    reply(
        {
            "ready": True,
            "load_seconds": time.perf_counter() - start,
            "versions": {package: metadata.version(package) for package in packages},
            "settings": dict(engine.settings),
        }
    )
    for line in sys.stdin:
        try:
            reply(answer(engine, json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            reply({"error": f"{type(error).__name__}: {error}"})


def answer(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    """Time one request."""
    prompts, new_tokens = request["prompts"], request["new_tokens"]
    engine.prepare(prompts, new_tokens)
    start = time.perf_counter()
    answers = engine.generate(prompts, new_tokens)
    return {
        "wall_seconds": time.perf_counter() - start,
        "prefill_seconds": answers.prefill_seconds,
        "output_token_ids": answers.token_ids,
        "preemptions": answers.preemptions,
        "first_token_seconds": answers.first_token_seconds,
        "cached_tokens": answers.cached_tokens,
    }

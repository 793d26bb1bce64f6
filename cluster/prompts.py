"""Prompts and settings as callers of `LLM` write them: one or several, text or token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from saqqara.compression.retention import Retention
from saqqara.configs.shown import budget_mistake, shown

from .chat import check_messages
from .request import Prompt, Request, RetentionSpec
from .sampling import SamplingParams
from .settings import check_keys

Budget = int | str


def is_single(value: Any) -> bool:
    """Whether a prompt stands alone: text, a mapping, or a plain list of token ids."""
    if isinstance(value, (str, Mapping)):
        return True
    return is_list(value) and bool(value) and _is_token(value[0])


def is_list(value: Any) -> bool:
    """Whether it may hold token ids or prompts; bytes are a sequence of numbers, but no prompt."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_list(value: Any, name: str) -> list[Any]:
    """Several prompts, from one or several.

    Raises:
        ValueError: it is neither.
    """
    if is_single(value):
        return [value]
    if not is_list(value):
        raise ValueError(f"{name} must be text, token ids, or a list of these, not {shown(value)}")
    return list(value)


def one_prompt(prompt: Any, index: int, name: str = "prompts") -> Prompt:
    """Text or token ids, from either or from a mapping that has one of them.

    Raises:
        ValueError: it is none of these; names the index.
    """
    if isinstance(prompt, Mapping):
        check_keys(prompt, ("prompt", "prompt_token_ids"), f"{name}[{index}]")
        given = [value for value in prompt.values() if value is not None]
        if len(given) != 1:
            raise ValueError(f"{name}[{index}] needs either prompt or prompt_token_ids")
        prompt = given[0]
    if isinstance(prompt, str):
        return prompt
    if is_list(prompt) and all(map(_is_token, prompt)):
        return tuple(int(token) for token in prompt)
    raise ValueError(f"{name}[{index}] must be text or a list of token ids, not {shown(prompt)}")


def one_conversation(messages: Any, index: int) -> tuple[Mapping[str, str], ...]:
    """The messages of a conversation, checked.

    Raises:
        ValueError: they are none; names the index.
    """
    try:
        return tuple(check_messages(messages))
    except ValueError as error:
        raise ValueError(f"messages[{index}]: {error}") from None


def one_each(value: Any, kinds: type | tuple[type, ...], count: int, name: str) -> Sequence[Any]:
    """One value for each of `count` requests, from one for all or a list.

    Raises:
        ValueError: the list has another length, or a value is not of these kinds.
    """
    if value is None or isinstance(value, kinds):
        return [value] * count
    if not isinstance(value, Sequence) or len(value) != count:
        raise ValueError(
            f"{name} must be one value, or a list with one for each of {count} prompts, not "
            f"{type(value).__name__} {shown(value)}"
        )
    for i, one in enumerate(value):
        if one is not None and not isinstance(one, kinds):
            right = " or ".join(_kind_name(kind) for kind in _as_tuple(kinds))
            raise ValueError(f"{name}[{i}]: must be {right} or None, not {shown(one)}")
    return list(value)


def with_turns(
    requests: list[Request], priority: int | Sequence[int], timeout_seconds: float | None
) -> list[Request]:
    """The requests with when they have their turn, and how long they may take."""
    priorities = one_each(priority, int, len(requests), "priority")
    return [
        replace(request, priority=priorities[i] or 0, timeout_seconds=timeout_seconds)
        for i, request in enumerate(requests)
    ]


def with_memory(
    requests: list[Request], cache_salt: str, session: str | Sequence[str | None] | None = None
) -> list[Request]:
    """The requests with who may share their prefixes, and the conversations that they go on.

    Raises:
        ValueError: one conversation has two turns in one call.
    """
    sessions = one_each(session, str, len(requests), "session")
    named = [one for one in sessions if one is not None]
    if len(set(named)) < len(named):
        raise ValueError(
            "session: turns of one conversation come one after the other; give each "
            "conversation of a call another one"
        )
    return [
        replace(request, cache_salt=cache_salt, conversation_id=sessions[i])
        for i, request in enumerate(requests)
    ]


def with_settings(
    requests: list[Request],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    retention: RetentionSpec | Sequence[RetentionSpec | None] | None,
    budget: Budget | Sequence[Budget | None] | None,
) -> list[Request]:
    """The requests with what the caller says of all, or of each."""
    count = len(requests)
    sampling = one_each(sampling_params, SamplingParams, count, "sampling_params")
    retentions = one_each(retention, (str, Mapping, Retention), count, "retention")
    if isinstance(budget, float):
        raise ValueError(budget_mistake(budget))
    if isinstance(retention, Mapping | str) and (budget is None or isinstance(budget, int | str)):
        Retention.parse(retention, budget)  # a mistake in it is no prompt's
    budgets = one_each(budget, (int, str), count, "budget")
    return [
        replace(
            request,
            sampling_params=sampling[i] or SamplingParams(),
            retention=retentions[i],
            budget=budgets[i],
        )
        for i, request in enumerate(requests)
    ]


def _as_tuple(kinds: type | tuple[type, ...]) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _kind_name(kind: type) -> str:
    plain = {str: "a string", int: "an integer", Mapping: "a mapping"}
    return plain.get(kind, f"a {kind.__name__}")

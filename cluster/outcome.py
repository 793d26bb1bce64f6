"""How a sequence may end, and whether it fits at all: words of scheduler, engine and front ends."""

from dataclasses import dataclass
from typing import Literal

from .errors import ContextLengthError

FinishReason = Literal["stop", "length", "abort", "error"]
# Why a sequence ended with `error`: more than the replica can hold, what it computes is broken, or
# what its request asks of the answer leaves no token, or its time is over.
ErrorCode = Literal[
    "request_too_large", "computation_failed", "constraint_failed", "deadline_exceeded"
]
# What who samples may do about a prompt that is too long; in other words elsewhere.
TRUNCATION_HINT = " (truncate_prompt_tokens=-1 keeps the last that fit)"


@dataclass(frozen=True, slots=True)
class KVUsage:
    """Keys and values at the end of a sequence: what was kept, and what full retention would keep.

    `kept_tokens` are summed over the rows, so over all layers and kv heads of the model; bytes are
    those of these tokens, without what is left empty in their pages. Layers with sliding-window
    attention are none of them: they keep their window in any case, in `local_bytes`.
    `kept_tokens_by_layer` has the tokens of all layers, the lowest first; it is empty where nothing
    was prefilled.
    """

    kept_tokens: int = 0
    full_tokens: int = 0
    kept_bytes: int = 0
    full_bytes: int = 0
    kept_tokens_by_layer: tuple[int, ...] = ()
    local_bytes: int = 0

    def __add__(self, other: "KVUsage") -> "KVUsage":
        """Of several sequences together."""
        return KVUsage(
            self.kept_tokens + other.kept_tokens,
            self.full_tokens + other.full_tokens,
            self.kept_bytes + other.kept_bytes,
            self.full_bytes + other.full_bytes,
            _added(self.kept_tokens_by_layer, other.kept_tokens_by_layer),
            self.local_bytes + other.local_bytes,
        )


def _added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Layer by layer, of one model; empty is nothing."""
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else a or b


def check_room(num_tokens: int, max_tokens: int | None, max_model_len: int) -> None:
    """Raise a `ContextLengthError` unless a prompt, and `max_tokens` after it, fit the context."""
    room = max_model_len - num_tokens
    if room < 1:
        raise ContextLengthError(
            f"prompt has {num_tokens} tokens; max_model_len={max_model_len} leaves room "
            f"for at most {max_model_len - 1} and one new token{TRUNCATION_HINT}"
        )
    if max_tokens is not None and max_tokens > room:
        raise ContextLengthError(
            f"max_tokens is {max_tokens}; beside the {num_tokens} tokens of the prompt "
            f"max_model_len={max_model_len} has room for {room}"
        )

"""Decode-stage retention: rows that grow while a sequence decodes are cut back to what they were.

When a row has grown by the slack beyond its target, its kept tokens are scored and the target
number of them stays. All rows of a sequence grow by one per fed token, so all of them are compacted
in the same step, and how much they keep is a pure function of how many tokens were fed: `Cycle`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .registry import score_method

if TYPE_CHECKING:
    from .retention import Retention


@dataclass(frozen=True, slots=True)
class DecodeStage:
    """The `decode` setting of a retention.

    Attributes:
        slack_pages: pages by which a row outgrows its target before it is compacted, at least 1.
            More of them make compactions rarer, and each of them drops more.

    Raises:
        ValueError: `slack_pages` is no such number.
    """

    slack_pages: int = 4

    def __post_init__(self) -> None:
        if type(self.slack_pages) is not int or self.slack_pages < 1:
            raise ValueError(
                "decode.slack_pages: must be an integer of at least 1 (pages of `page_tokens` "
                f"tokens), not {self.slack_pages!r}"
            )

    @classmethod
    def parse(cls, value: object) -> "DecodeStage | None":
        """Read the setting as users write it: a mapping, true for the defaults; null is off.

        Raises:
            ValueError: anything else, or an unknown or bad entry, by its name.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, DecodeStage):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(
                "decode: must be a mapping such as {slack_pages: 4}, or true for the defaults, "
                f"not {value!r}"
            )
        unknown = [name for name in value if name != "slack_pages"]
        if unknown:
            raise ValueError(f"decode.{unknown[0]}: not a setting; allowed: slack_pages")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `parse` reads it back."""
        return {"slack_pages": self.slack_pages}


@dataclass(frozen=True, slots=True)
class Cycle:
    """How the rows of one sequence grow and shrink, all numbers in tokens.

    A row that kept c tokens after prefill has the target `c + grace`. It is compacted to it
    whenever it has reached `c + grace + slack`: after `grace + slack` fed tokens, and then once
    every `slack` tokens. It never keeps more.

    `grace` is 0 where prefill dropped tokens. A prompt that was kept whole is shorter than the
    budget, and each of its rows may first grow up to it.
    """

    grace: int
    slack: int

    @property
    def most(self) -> int:
        """The most tokens by which rows ever outgrow what prefill kept."""
        return self.grace + self.slack

    def grown(self, fed_tokens: int) -> int:
        """How many tokens more than after prefill a row keeps, once so many are fed."""
        return int(grown(np.int64(fed_tokens), np.int64(self.grace), np.int64(self.slack)))

    def fires(self, fed_tokens: int) -> bool:
        """Whether rows are compacted after the last of so many fed tokens."""
        return fed_tokens >= self.most and (fed_tokens - self.grace) % self.slack == 0

    def num_compactions(self, fed_tokens: int) -> int:
        """Compactions so far, including one after the last of so many fed tokens."""
        return max(fed_tokens - self.grace, 0) // self.slack

    def room(self, fed_tokens: int) -> int:
        """Tokens that can be fed before the next compaction, the one that triggers it included."""
        return self.most - self.grown(fed_tokens)


def grown(fed: Any, grace: Any, slack: Any) -> NDArray[np.int64]:
    """`Cycle.grown` for arrays; a slack of 0 means that rows are never compacted."""
    cyclic = grace + (fed - grace) % np.maximum(slack, 1)
    grows: NDArray[np.int64] = np.where((slack > 0) & (fed >= grace + slack), cyclic, fed)
    return grows


def cycle_of(retention: "Retention", prompt_tokens: int, page_tokens: int) -> Cycle | None:
    """The cycle of a sequence with such a prompt; None without a decode stage."""
    if retention.decode is None:
        return None
    grace = 0 if retention.drops(prompt_tokens) else retention.budget_of(prompt_tokens)
    grace = max(grace - prompt_tokens, 0)
    return Cycle(grace, retention.decode.slack_pages * page_tokens)


def num_ring_queries(retention: "Retention") -> int:
    """Queries of the last tokens that must be remembered while a sequence decodes."""
    if retention.decode is None:
        return 0
    assert retention.score is not None
    observed = score_method(retention.score).at_decode
    assert observed is not None, "checked by Retention"
    return {"none": 0, "window queries": retention.window, "last query": 1}[observed]

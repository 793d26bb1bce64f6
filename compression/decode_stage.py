"""Decode-stage retention: rows that grow while a sequence decodes are cut back to what they were.

When a row has grown by the slack beyond its target, its kept tokens are scored and the target
number of them stays. All rows of a sequence grow by one per fed token, so all of them are compacted
in the same step, and how much they keep is a pure function of how many tokens were fed: `Cycle`.

That is the stage of the scores. PyramidInfer, which has no targets, trims its rows in another way
(`trim.py`); the `decode` setting of a retention is one of the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saqqara.configs.shown import shown

from .bounds import check
from .registry import score_method
from .trim import TrimmedRows, TrimStage, most_queries

if TYPE_CHECKING:
    from .retention import Retention


@dataclass(frozen=True, slots=True)
class DecodeStage:
    """The `decode` setting of a retention with a score.

    Attributes:
        slack_pages: pages by which a row outgrows its target before it is compacted, at least 1.
            More of them make compactions rarer, and each of them drops more.

    Raises:
        ValueError: `slack_pages` is no such number.
    """

    slack_pages: int = 4

    def __post_init__(self) -> None:
        check("decode.slack_pages", self.slack_pages)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `parse_stage` reads it back."""
        return {"slack_pages": self.slack_pages}

    @property
    def label(self) -> str:
        """As reports write it."""
        return str(self.slack_pages)


Stage = DecodeStage | TrimStage


def parse_stage(value: object, has_score: bool) -> Stage | None:
    """Read the setting as users write it: a mapping, true for the defaults; null is off.

    Args:
        value: what was written.
        has_score: whether the retention has a score; only what propagates has none.

    Raises:
        ValueError: anything else, or an unknown or bad entry, by its name.
    """
    kind: type[Stage] = DecodeStage if has_score else TrimStage
    if value is None or value is False:
        return None
    if value is True:
        return kind()
    if isinstance(value, DecodeStage | TrimStage):
        return value
    example = kind().to_dict()
    if not isinstance(value, Mapping):
        raise ValueError(
            f"decode: must be a mapping such as {example}, or true for the defaults, not "
            f"{shown(value)}"
        )
    unknown = [name for name in value if name not in example]
    if unknown:
        of_score, others = DecodeStage().to_dict(), TrimStage().to_dict()
        hint = ""
        if unknown[0] in (*of_score, *others):
            hint = (
                f" ({', '.join(of_score)} is for methods with a score, {' and '.join(others)} for "
                "pyramidinfer without one)"
            )
        allowed = ", ".join(example)
        raise ValueError(f"decode.{unknown[0]!s:.80}: not a setting; allowed: {allowed}{hint}")
    return kind(**value)


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
    """The cycle of a sequence with such a prompt; None where rows have no targets."""
    if not isinstance(retention.decode, DecodeStage):
        return None
    grace = 0 if retention.drops(prompt_tokens) else retention.budget_of(prompt_tokens)
    grace = max(grace - prompt_tokens, 0)
    return Cycle(grace, retention.decode.slack_pages * page_tokens)


def trimmed_rows(retention: "Retention", prompt_tokens: int, num_layers: int) -> TrimmedRows | None:
    """The rows, after prefill, of a sequence that is trimmed; None where none are."""
    if not isinstance(retention.decode, TrimStage):
        return None
    assert retention.propagate is not None, "checked by Retention"
    stored = retention.entering_tokens(prompt_tokens, num_layers)
    return TrimmedRows(retention.decode, retention.propagate, prompt_tokens, stored)


def num_ring_queries(retention: "Retention") -> int:
    """Queries of the last tokens that a compaction of a row with a target looks at."""
    if not isinstance(retention.decode, DecodeStage):
        return 0
    observed = _observed(retention)
    return {"nothing": 0, "mass": 0, "window queries": retention.window, "last query": 1}[observed]


def ring_size(retention: "Retention", prompt_tokens: int, max_tokens: int) -> int:
    """Queries of the last tokens that must be remembered while a sequence decodes.

    Args:
        retention: of the sequence.
        prompt_tokens: length of its prompt.
        max_tokens: of prompt and output together.
    """
    if not isinstance(retention.decode, TrimStage):
        # A ring that no sequence can fill is never read.
        return min(num_ring_queries(retention), max_tokens)
    assert retention.propagate is not None, "checked by Retention"
    return most_queries(retention.decode, retention.propagate, prompt_tokens, max_tokens)


def most_ring_size(retention: "Retention", max_tokens: int) -> int:
    """The largest `ring_size` of any sequence of at most so many tokens."""
    if isinstance(retention.decode, TrimStage) and retention.decode.is_published:
        assert retention.propagate is not None, "checked by Retention"
        return retention.propagate.recent_tokens(max_tokens)
    return ring_size(retention, max_tokens, max_tokens)


def remembers_normalisers(retention: "Retention") -> bool:
    """Whether each remembered query needs the normaliser that its attention had.

    A later cut drops keys which that query saw, so it cannot be found again.
    """
    return isinstance(retention.decode, TrimStage) and retention.decode.is_published


def feeds_single_tokens(retention: "Retention") -> bool:
    """Whether such a sequence is always fed token by token, also where it is scored.

    Decode steps alone report the attention, or the normalisers, that its cuts go by.
    """
    return sums_mass(retention) or remembers_normalisers(retention)


def sums_mass(retention: "Retention") -> bool:
    """Whether the attention that each stored token gets must be summed up while decoding."""
    return isinstance(retention.decode, DecodeStage) and _observed(retention) == "mass"


def _observed(retention: "Retention") -> str:
    assert retention.score is not None
    observed = score_method(retention.score).at_decode
    assert observed is not None, "checked by Retention"
    return observed

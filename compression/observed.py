"""What a score looks at and what it keeps by rule: counts, known before there are any tensors."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .retention import Retention


def observe_none(retention: "Retention", prompt_tokens: int) -> int:
    """Queries that a score needs which looks at none."""
    return 0


def observe_window(retention: "Retention", prompt_tokens: int) -> int:
    """Queries that a score needs which looks at the window's: w, or all of a shorter prompt."""
    return min(retention.window, prompt_tokens)


def observe_all(retention: "Retention", prompt_tokens: int) -> int:
    """Queries that a score needs which looks at all of them: n."""
    return prompt_tokens


def keep_window(retention: "Retention", kept_tokens: int) -> int:
    """Last tokens that a row keeps whatever their score: the window."""
    return retention.window


def keep_recent(retention: "Retention", kept_tokens: int) -> int:
    """Last tokens that a row keeps whatever their score: `recent_ratio` of it, after the sinks."""
    recent = math.floor(Fraction(str(retention.recent_ratio)) * kept_tokens)
    return min(recent, kept_tokens - retention.sinks)

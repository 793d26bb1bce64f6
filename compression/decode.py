"""The `decode` setting: rows that grow while a sequence decodes are cut back. Two stages.

With a score, rows are compacted to what they were (`DecodeStage`). PyramidInfer without a score has
no targets and trims its rows in another way (`TrimStage`). `growth.py` counts what either leaves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saqqara.configs.shown import shown

from .bounds import check, check_choice
from .propagate import part_of

TRIGGERS = ("stored", "published")

_RHO = 0.1  # what the cosine of the layers falls to
_SHARE = 0.9  # kept by layer 0


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
        """As JSON values; `parse_decode_stage` reads it back."""
        return {"slack_pages": self.slack_pages}

    @property
    def label(self) -> str:
        """As reports write it."""
        return str(self.slack_pages)


@dataclass(frozen=True, slots=True)
class TrimStage:
    """The `decode` setting of `pyramidinfer` without a score: a few tokens go at a time.

    Yang et al., arXiv 2405.12532 (ACL 2024), section 3.3. A layer that fires looks at the `exceed`
    stored tokens before its recent ones and keeps some of them, fewer in higher layers.

    There are two triggers. `published` is the authors' code. Its threshold follows what was *ever*
    seen, so a layer that has fired once soon fires in every step, and it protects nothing but the
    recent tokens: it eats the prompt, and of a long answer it leaves nearly nothing (over 30 layers
    at the 7B setting, 5,309 tokens after 400 of prompt and 240 more, 166 after 2,000 more).
    `stored` is ours: a layer fires once for `exceed` more tokens that it stores, and sinks stay.

    One thing of the authors' code is left out. It multiplies the weights of the queries into the
    attention that it remembers, in place, so that at each firing older rows are weighted once more;
    here each query has the weight of its place.

    Attributes:
        trigger: when a layer fires, by what it scores, and what it protects.
            "published", as the authors' code: once the tokens ever seen, less the recent ones, are
            `exceed` more than a mark, which is what the layer stored after prefill and, after a
            cut, what it stores then less the recent ones. The score is the attention of the last
            and all recent queries. Where fewer than `exceed` tokens stand before the recent ones,
            sinks included, these are cut.
            "stored" (ours): once it stores `exceed` more tokens than after its last cut. The score
            is the attention of the last query. Sinks stay; a layer that has not `exceed` tokens
            between them and the recent ones waits until it has.
        exceed: tokens that are looked at, at least 2.

    Raises:
        ValueError: no such trigger or number.
    """

    trigger: str = "stored"
    exceed: int = 16

    def __post_init__(self) -> None:
        check_choice("decode.trigger", self.trigger, TRIGGERS)
        check("decode.exceed", self.exceed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `parse_decode_stage` reads it back."""
        return {"trigger": self.trigger, "exceed": self.exceed}

    @property
    def label(self) -> str:
        """As reports write it."""
        return self.trigger if self.exceed == 16 else f"{self.trigger}/{self.exceed}"

    @property
    def is_published(self) -> bool:
        """Whether it is the authors' own."""
        return self.trigger == "published"

    def kept(self, layer: int, num_layers: int, candidates: int) -> int:
        """How many of so many tokens a layer keeps."""
        cosine = _RHO + (1 - _RHO) * (math.cos(math.pi * layer / num_layers) + 1) / 2
        return min(max(part_of(_SHARE * cosine, candidates), 1), candidates)


AnyDecodeStage = DecodeStage | TrimStage


def parse_decode_stage(value: object, has_score: bool) -> AnyDecodeStage | None:
    """Read the setting as users write it: a mapping, true for the defaults; null is off.

    Args:
        value: what was written.
        has_score: whether the retention has a score; only what propagates has none.

    Raises:
        ValueError: anything else, or an unknown or bad entry, by its name.
    """
    kind: type[AnyDecodeStage] = DecodeStage if has_score else TrimStage
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

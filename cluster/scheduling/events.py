"""What happens to sequences, as the scheduler tells it to whoever drives it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saqqara.workers.plan import TokenLogprobs

from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class NewToken:
    """A sequence has one more token; it is already in `output_token_ids`."""

    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class NewScores:
    """`num_tokens` more tokens of a continuation have their scores in the sequence."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt is through all layers; `kept` int32 [L, H] says what is left of it."""

    sequence: Sequence
    kept: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Preempted:
    """A sequence lost its slot and waits, with its tokens, to be resumed."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing more comes of a sequence; it says itself why."""

    sequence: Sequence


Event = NewToken | NewScores | Prefilled | Preempted | Finished

"""What prefill holds between two layer ranges, and what it leaves after the last.

Shapes: T packed tokens, R rows of them, n tokens of one prompt, E hidden size, L local layers, H
local kv heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import add
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.models.layer import Places
from saqqara.workers.state.slots import SlotTable
from saqqara.workers.transfer import to_device


@dataclass
class ParkedPrefill:
    """A prefill group between two layer ranges: hidden states [T, E] and where they stand.

    `families` has the slots by their leader. `cu` delimits each leader's tokens that are still on
    their way, in the order of their positions; those of its cached blocks, which come before them,
    are not among them. `cached` has the pages of these blocks, [blocks, L, H] of each leader (none
    behind a layer that drops tokens: what goes on of the cached ones is computed there), and
    `resumed` what stands before a prompt that goes on behind its slot's rows. `for_blocks` are
    hidden states that the next stage puts into blocks.
    """

    families: dict[int, list[int]]
    hidden_TE: Tensor
    places: Places
    cu: CuSeqlens
    cached: list[NDArray[np.int32]]
    resumed: list["ResumedRows | None"]
    for_blocks: Tensor | None = None

    @property
    def slots(self) -> list[int]:
        """Of all families, one after the other."""
        return [slot for family in self.families.values() for slot in family]

    @property
    def num_tokens(self) -> int:
        """Packed tokens, T."""
        return self.hidden_TE.shape[0]

    @property
    def reuses(self) -> bool:
        """Whether some prompt has keys and values before those of its computed tokens."""
        return any(map(len, self.cached)) or any(rows is not None for rows in self.resumed)

    def parts(self, most_keys: int, reused_tokens: Sequence[int]) -> list[tuple[slice, Self]]:
        """Prompts whose keys, reused ones included, are at most so many together, or one prompt.

        Args:
            most_keys: as many.
            reused_tokens: of each prompt.

        Returns:
            Views of them, and where their tokens are.
        """
        bounds, held = [0], 0
        for number, keys in enumerate(map(add, self.cu.lengths, reused_tokens)):
            if held and held + keys > most_keys:
                bounds.append(number)
                held = 0
            held += keys
        bounds.append(len(self.families))
        if len(bounds) == 2:
            return [(slice(0, self.num_tokens), self)]
        return [self._part(start, stop) for start, stop in pairwise(bounds)]

    def _part(self, start: int, stop: int) -> tuple[slice, Self]:
        """The prompts from number `start` up to `stop`, and where their tokens are."""
        tokens, prompts = slice(self.cu.host[start], self.cu.host[stop]), slice(start, stop)
        part = replace(
            self,
            families=dict(list(self.families.items())[prompts]),
            hidden_TE=self.hidden_TE[tokens],
            places=self.places.of(tokens),
            cu=CuSeqlens.of(self.cu.lengths[prompts], self.hidden_TE.device),
            cached=self.cached[prompts],
            resumed=self.resumed[prompts],
        )
        return tokens, part

    @property
    def num_bytes(self) -> int:
        """Bytes that the group holds while it is parked."""
        return self.hidden_TE.nbytes + self.places.num_bytes

    def wanted(self, slots: SlotTable) -> CuSeqlens:
        """How many of each prompt's last tokens go through the whole of the last layer."""
        counts = [
            length if any(slots[slot].scores_prompt for slot in family) else 1
            for family, length in zip(self.families.values(), self.cu.lengths, strict=True)
        ]
        return CuSeqlens.of(counts, self.hidden_TE.device)

    def narrow(self, hidden_TE: Tensor, places: Places, cu: CuSeqlens) -> None:
        """Go on with these tokens only."""
        self.hidden_TE, self.places, self.cu = hidden_TE, places, cu


@dataclass(frozen=True, slots=True)
class ResumedRows:
    """What a prompt goes on behind.

    Attributes:
        counts: tokens that each row keeps, int32 [L, H]; also of a refused slot, for other ranks
            have them.
        rings: keys and values [tokens, H, D] of the layers with a window, in the order of the text.
            The rows there are empty.
    """

    counts: NDArray[np.int32]
    rings: dict[int, tuple[Tensor, Tensor]]


@dataclass
class Finals:
    """What left the model's last layer in one step, by slot.

    `last` has the hidden state [E] of each prompt's last token, `whole` those of all of its tokens
    [n, E], for slots whose prompts are scored.
    """

    last: dict[int, Tensor] = field(default_factory=dict)
    whole: dict[int, Tensor] = field(default_factory=dict)

    def take(
        self,
        families: dict[int, list[int]],
        wanted: CuSeqlens,
        hidden_RE: Tensor,
        slots: SlotTable,
    ) -> None:
        """Take in what came out of the last layer, of each family the `wanted` last tokens."""
        for family, stop, length in zip(
            families.values(), wanted.host[1:], wanted.lengths, strict=True
        ):
            for slot in family:
                self.last[slot] = hidden_RE[stop - 1]
                if slots[slot].scores_prompt:
                    self.whole[slot] = hidden_RE[stop - length : stop]


def last_rows(wanted: CuSeqlens, cu: CuSeqlens) -> Tensor:
    """The rows of the last tokens of each sequence of `cu`, as many as `wanted` has, int64 [R]."""
    if wanted.max_len == 1:
        return cu.device[1:].long() - 1
    rows = [
        np.arange(stop - length, stop)
        for stop, length in zip(cu.host[1:], wanted.lengths, strict=True)
    ]
    return to_device(np.concatenate(rows), cu.device.device)

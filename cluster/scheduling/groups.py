"""A prefill group: prompts that go through the layers together, and what that costs."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate

from .sequence import Sequence


@dataclass(slots=True, eq=False)
class Group:
    """Prompts on their way through the layers; the next plan starts at `next_layer`.

    `layer_tokens` are the tokens computed in each layer: a prompt that several share counts once,
    and propagation leaves fewer for the upper layers.
    """

    sequences: list[Sequence]
    slots: tuple[int, ...]
    layer_tokens: tuple[int, ...]
    next_layer: int = 0

    @classmethod
    def of(cls, families: Many[Many[Sequence]], num_layers: int) -> "Group":
        """A group of seated sequences; the first of each family is computed for all of it."""
        members = [sequence for family in families for sequence in family]
        slots = [sequence.slot for sequence in members if sequence.slot is not None]
        assert len(slots) == len(members), "a member has no slot"
        leaders = [family[0] for family in families]
        entering = [
            s.request.retention.entering_tokens(s.prompt_tokens, num_layers) for s in leaders
        ]
        return cls(members, tuple(slots), tuple(map(sum, zip(*entering, strict=True))))

    def stop_within(self, quantum: int) -> int:
        """Where a range of at most `quantum` layers x tokens stops; it has at least one layer."""
        sums = accumulate(self.layer_tokens[self.next_layer :])
        return self.next_layer + max(1, sum(total <= quantum for total in sums))

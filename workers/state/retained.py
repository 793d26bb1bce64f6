"""When the rows of each slot are cut while its sequence decodes, and how long they then are."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.growth import Cycle, TrimmedRows, cycle_of, trimmed_rows
from saqqara.compression.layers import Layers
from saqqara.workers.plan import NewSequence


@dataclass(frozen=True, slots=True)
class RetainedSlot:
    """How the rows of one sequence are cut; see `Retained`.

    The next turn of a conversation takes none of it over: the end of its prefill is a cut like
    another, and cycles begin there.
    """

    cycle: Cycle | None
    trimmed: TrimmedRows | None
    after_prefill: NDArray[np.int32] | None


class Retained:
    """The slots whose rows are cut while they decode.

    Args:
        layers: of the whole model; a number of them: all see all tokens.
        local_shape: this rank's layers and kv heads.
        page_tokens: tokens of one page.

    Attributes:
        cycles: when the rows of a slot are compacted, for the slots with a decode stage.
        trimmed: how long the rows of a slot are, for the slots that are trimmed instead.
        after_prefill: what prefill selected for the slots in `cycles`, refused or not: int32
            [local layers, local kv heads].
    """

    def __init__(
        self, layers: Layers | int, local_shape: tuple[int, int], page_tokens: int
    ) -> None:
        self.cycles: dict[int, Cycle] = {}
        self.trimmed: dict[int, TrimmedRows] = {}
        self.after_prefill: dict[int, NDArray[np.int32]] = {}
        self._layers = layers
        self._local_shape = local_shape
        self._page_tokens = page_tokens

    def __contains__(self, slot: int) -> bool:
        return slot in self.cycles or slot in self.trimmed

    def add(self, new: NewSequence) -> None:
        """Note how a sequence that takes a slot will be cut, if it will."""
        cycle = cycle_of(new.retention, new.prompt_tokens, self._page_tokens)
        if cycle is not None:
            self.cycles[new.slot] = cycle
            self.after_prefill[new.slot] = np.zeros(self._local_shape, dtype=np.int32)
        trimmed = trimmed_rows(new.retention, new.prompt_tokens, self._layers)
        if trimmed is not None:
            self.trimmed[new.slot] = trimmed

    def copy_of(self, slot: int) -> RetainedSlot:
        """What is known of a slot, as it is now."""
        trimmed, after_prefill = self.trimmed.get(slot), self.after_prefill.get(slot)
        return RetainedSlot(
            self.cycles.get(slot),
            None if trimmed is None else trimmed.copy(),
            None if after_prefill is None else after_prefill.copy(),
        )

    def restore(self, slot: int, known: RetainedSlot) -> None:
        """Go on in a slot with what was known of another."""
        assert slot not in self, f"slot {slot} is not free"
        if known.cycle is not None:
            assert known.after_prefill is not None
            self.cycles[slot], self.after_prefill[slot] = known.cycle, known.after_prefill.copy()
        if known.trimmed is not None:
            self.trimmed[slot] = known.trimmed.copy()

    def free(self, slot: int) -> None:
        """Forget a slot."""
        for of_slot in (self.cycles, self.trimmed, self.after_prefill):
            of_slot.pop(slot, None)

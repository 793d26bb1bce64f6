"""What a worker remembers of each slot: its tokens, sampling and retention."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.retention import Retention
from saqqara.workers.plan import (
    CachedPrefix,
    DecodeItem,
    NewSequence,
    PrefillGroup,
    SamplingSpec,
    StepPlan,
)


@dataclass(frozen=True, slots=True)
class Slot:
    """The sequence that holds a slot. `ticket` tells it from earlier holders of the same slot.

    `leader` is the slot whose prompt is prefilled for it: its own, unless it shares a prefill.
    What its prefill has of blocks and fills of them is in its `prefix`; of a follower only whether
    its rows share pages counts, for its leader's is its own. Of a prompt that goes on behind
    rows, `resumed_tokens` are not computed.
    """

    ticket: int
    prompt_tokens: int
    known_tokens: int
    sampling: SamplingSpec
    retention: Retention
    score: bool
    leader: int
    prefix: CachedPrefix
    resumed_tokens: int

    def num_reused(self, page_tokens: int) -> int:
        """First tokens of its prompt that are not computed: blocks or rows stand for them."""
        return len(self.prefix.cached) * page_tokens or self.resumed_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether its prompt's tokens get log-probabilities."""
        return self.sampling.num_prompt_logprobs is not None

    @property
    def samples_after_prefill(self) -> bool:
        """Whether the end of prefill is where the next token comes from."""
        return not self.score and self.known_tokens == self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Target:
    """A place where the plan asks for the token at `position` of `slot`: sampled, or scored."""

    slot: int
    ticket: int
    position: int


class SlotTable:
    """Tokens and settings by slot. Every stage holds one and derives the same from each plan.

    `tokens` is int32 [num_slots, max_tokens]; entries past what is known are stale.
    """

    def __init__(self, num_slots: int, max_tokens: int) -> None:
        self.tokens: NDArray[np.int32] = np.zeros((num_slots, max_tokens), dtype=np.int32)
        self._slots: dict[int, Slot] = {}
        self._next_ticket = 0

    def __getitem__(self, slot: int) -> Slot:
        return self._slots[slot]

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def add(self, new: NewSequence) -> None:
        """Give a free slot to a sequence."""
        assert new.slot not in self._slots, f"slot {new.slot} is taken"
        leader = new.slot if new.shares_prefill_with is None else new.shares_prefill_with
        if leader != new.slot:
            ahead = self._slots[leader]
            assert ahead.leader == leader, f"slot {leader} leads slot {new.slot}, but follows"
            assert ahead.prompt_tokens == new.prompt_tokens, "another prompt cannot be shared"
        tokens = new.tokens()
        self.tokens[new.slot, : len(tokens)] = tokens
        self._slots[new.slot] = Slot(
            self._next_ticket,
            new.prompt_tokens,
            len(tokens),
            new.sampling,
            new.retention,
            new.score,
            leader,
            new.prefix or CachedPrefix(),
            new.resumed_tokens if goes_on_in_prefill(new) else 0,
        )
        self._next_ticket += 1

    def free(self, slot: int) -> None:
        """Take the slot back."""
        del self._slots[slot]

    def families(self, slots: tuple[int, ...]) -> dict[int, list[int]]:
        """The slots of a prefill group by their leader, which comes first among its own."""
        by_leader: dict[int, list[int]] = {}
        for slot in slots:
            by_leader.setdefault(self._slots[slot].leader, []).append(slot)
        assert all(leader == family[0] for leader, family in by_leader.items())
        return by_leader

    def holds(self, target: Target) -> bool:
        """Whether the slot is still that of the sequence that the target was made for."""
        held = self._slots.get(target.slot)
        return held is not None and held.ticket == target.ticket

    def put_token(self, target: Target, token_id: int) -> None:
        """Record a sampled token, unless the slot has changed hands since."""
        if self.holds(target):
            self.tokens[target.slot, target.position] = token_id

    def prompt(self, slot: int) -> NDArray[np.int32]:
        """Prompt tokens of a slot, int32 [n]."""
        return self.tokens[slot, : self._slots[slot].prompt_tokens]

    def output(self, target: Target) -> NDArray[np.int32]:
        """Tokens between the prompt and `target`, int32 [m]."""
        return self.tokens[target.slot, self._slots[target.slot].prompt_tokens : target.position]

    def feed(self, items: tuple[DecodeItem, ...]) -> NDArray[np.int32]:
        """The tokens that the decode items feed, concatenated, int32 [T]."""
        return np.concatenate(
            [self.tokens[i.slot, i.position : i.position + i.num_tokens] for i in items]
        )

    def samples(self, plan: StepPlan, num_layers: int) -> list[Target]:
        """Where the plan samples, in the order in which the last stage does."""
        prefilled = [
            self._target(slot, self[slot].prompt_tokens)
            for group in ended(plan, num_layers)
            for slot in group.slots
            if self[slot].samples_after_prefill
        ]
        decoded = [
            self._target(item.slot, item.position + item.num_tokens)
            for item in plan.decode
            if item.sample
        ]
        return prefilled + decoded

    def _target(self, slot: int, position: int) -> Target:
        return Target(slot, self[slot].ticket, position)


def goes_on_in_prefill(new: NewSequence) -> bool:
    """Whether a sequence resumes with rows that have not seen all of its prompt yet."""
    return new.resumes is not None and new.resumed_tokens < new.prompt_tokens


def ended(plan: StepPlan, stop_layer: int) -> list[PrefillGroup]:
    """The prefill groups whose range in this plan covers the layer before `stop_layer`."""
    return [g for g in plan.prefill if g.start_layer < stop_layer <= g.stop_layer]

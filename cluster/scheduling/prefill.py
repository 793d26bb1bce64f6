"""Prompts on their way through the layers: groups, their layer ranges, and who is admitted next."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate

from saqqara.cluster.reuse.limits import least_computed_tokens
from saqqara.cluster.reuse.prefixes import NOTHING, Found
from saqqara.compression.propagate import computed_tokens
from saqqara.compression.retention import Retention
from saqqara.workers.plan import PrefillGroup

from .draft import Draft
from .queue import SharedPrompts
from .roster import Roster
from .sequence import Sequence, Status


@dataclass(slots=True, eq=False)
class Group:
    """Prompts on their way through the layers; the next plan starts at `next_layer`.

    `layer_tokens` are the tokens computed in each layer: a prompt that several share counts once,
    what is cached of it does not count, and propagation leaves fewer for the upper layers. Of
    these, cached ones are computed there.
    """

    sequences: list[Sequence]
    slots: tuple[int, ...]
    layer_tokens: tuple[int, ...]
    next_layer: int = 0

    @classmethod
    def of(
        cls, families: Many[Many[Sequence]], cached_tokens: Many[int], num_layers: int
    ) -> "Group":
        """A group of seated sequences; the first of each family is computed for all of it.

        Of each family's prompt so many `cached_tokens` are not computed.
        """
        members = [sequence for family in families for sequence in family]
        slots = [sequence.slot for sequence in members if sequence.slot is not None]
        assert len(slots) == len(members), "a member has no slot"
        leaders = [family[0] for family in families]
        computed = [
            _computed(leader, num_cached, num_layers)
            for leader, num_cached in zip(leaders, cached_tokens, strict=True)
        ]
        return cls(members, tuple(slots), tuple(map(sum, zip(*computed, strict=True))))

    def stop_within(self, quantum: int) -> int:
        """Where a range of at most `quantum` layers x tokens stops; it has at least one layer."""
        sums = accumulate(self.layer_tokens[self.next_layer :])
        return self.next_layer + max(1, sum(total <= quantum for total in sums))


class PrefillPlanner:
    """Chooses which prompts go through which layers; the unit is a range of layers.

    Args:
        roster: the sequences.
        stages: layer ranges of the pipeline stages.
        max_num_seqs: slots.
        max_prefill_tokens: prompt tokens computed in one group (a longer prompt goes alone).
        prefill_quantum: layers x tokens per plan while others decode; None: no bound.
        max_model_len: most tokens of a sequence, prompt and output together.
    """

    def __init__(
        self,
        roster: Roster,
        stages: Many[tuple[int, int]],
        *,
        max_num_seqs: int,
        max_prefill_tokens: int,
        prefill_quantum: int | None,
        max_model_len: int,
    ) -> None:
        self._max_model_len = max_model_len
        self._roster = roster
        self._stages = stages
        self._max_num_seqs = max_num_seqs
        self._max_prefill_tokens = max_prefill_tokens
        self._prefill_quantum = prefill_quantum
        self._groups: list[Group] = []

    def advance(self, draft: Draft) -> None:
        """Give every group its next layers, the oldest first, one group per stage."""
        for group in list(self._groups):
            self._plan_range(draft, group)

    def _plan_range(self, draft: Draft, group: Group) -> None:
        stage = next(i for i, (_, stop) in enumerate(self._stages) if group.next_layer < stop)
        if stage in draft.busy_stages:
            return
        draft.busy_stages.add(stage)
        start_layer, stop_layer = group.next_layer, self._stages[stage][1]
        if self._prefill_quantum is not None and self._roster.running:
            stop_layer = min(stop_layer, group.stop_within(self._prefill_quantum))
        draft.prefill.append(PrefillGroup(group.slots, start_layer, stop_layer))
        group.next_layer = stop_layer
        self._roster.ledger.advance_prefill(group.slots, stop_layer)
        for slot, sequence in zip(group.slots, group.sequences, strict=True):
            draft.mention(slot, sequence)
            draft.prefilling[slot] = self._roster.seats.use_of(slot)
        if stop_layer == self._stages[-1][1]:
            self._end_group(draft, group)

    def _end_group(self, draft: Draft, group: Group) -> None:
        self._groups.remove(group)
        draft.through += group.slots
        for slot, sequence in zip(group.slots, group.sequences, strict=True):
            draft.prefilling[slot].is_through = True
            if sequence.is_finished or sequence.discarding:
                self._leave_group(sequence)
                continue
            self._roster.run(sequence)
            if not sequence.known_after_prompt:
                draft.sample(slot, sequence)

    def abandon(self) -> None:
        """Drop the groups of which nobody is left that wants to go on."""
        for group in list(self._groups):
            if all(s.is_finished or s.discarding for s in group.sequences):
                self._groups.remove(group)
                for sequence in group.sequences:
                    self._leave_group(sequence)

    def admit(self, draft: Draft) -> None:
        """Start one prefill group if stage 0 is free: the head of the queue and its like."""
        if 0 in draft.busy_stages or len(self._groups) >= len(self._stages):
            return
        while (head := self._roster.head) is not None and head.num_in_flight == 0:
            if head.parked_id is not None:
                return  # it goes on as soon as there is room
            if self._roster.seats.is_landing(head):
                return  # what it goes on from is known in a moment
            families = self._form_group()
            if families:
                self._start_group(draft, families)
                return
            if self._roster.seats.cached.is_filling:
                return  # blocks are ready, or idle, or gone, in a moment
            if self._roster.ledger.num_held > 0:
                self._roster.make_way()
                return
            if self._roster.drop_all_parked():
                return  # what they share with blocks is idle from the next plan on
            need = self._roster.seats.need(head, head.num_replay)
            self._roster.finish(head, "error", error=self._roster.seats.too_large(need))

    def _start_group(self, draft: Draft, families: list[list[Sequence]]) -> None:
        cached_tokens, ledger = [], self._roster.ledger
        for leader, *followers in families:
            use = self._roster.seats.use_of(leader.held_slot)
            cached = leader.resumed_tokens or len(use.cached) * ledger.page_tokens
            cached_tokens.append(cached)
            prefix = use.prefix() if leader.resumption is None else None
            draft.new.append(leader.new_sequence(prefix=prefix))
            for follower in followers:
                prefix = self._roster.seats.use_of(follower.held_slot).prefix()
                draft.new.append(follower.new_sequence(leader.held_slot, prefix))
        group = Group.of(families, cached_tokens, num_layers=self._stages[-1][1])
        self._groups.append(group)
        self._plan_range(draft, group)

    def _form_group(self) -> list[list[Sequence]]:
        """Seat the head and, as far as there is room, those behind it with the same retention.

        Each brings along those that can share its prefill, whatever their retention; they cost
        room, but no prefill. Those whose next block is just being stored are passed by until then.

        Returns:
            families: a leader, which is computed, and its followers.
        """
        families: list[list[Sequence]] = []
        tokens_left = self._max_prefill_tokens
        front = self._roster.front(2 * self._max_num_seqs)
        shared = SharedPrompts(front)
        like: Retention | None = None
        for sequence in front:
            is_seated = sequence.status is not Status.WAITING
            is_like_head = like is None or sequence.request.retention == like
            if is_seated or not is_like_head or sequence.num_in_flight:
                continue
            if self._roster.seats.is_landing(sequence):
                continue
            followers = shared.followers(sequence)
            found, num_cached = NOTHING, self._roster.seats.resumable_tokens(sequence)
            if not num_cached:
                found = self._find([sequence, *followers])
                num_cached = len(found.blocks) * self._roster.ledger.page_tokens
            if found.is_coming:
                continue
            computed = max(_computed(sequence, num_cached, self._stages[-1][1]))
            if families and computed > tokens_left:
                break
            if not self._roster.try_seat(sequence, found):
                break
            families.append([sequence])
            like = sequence.request.retention
            tokens_left -= computed
            used = self._roster.seats.use_of(sequence.held_slot).cached
            for follower in followers:
                if self._roster.try_seat(follower, Found(used)):
                    families[-1].append(follower)
        return families

    def _find(self, family: list[Sequence]) -> Found:
        """Blocks for sequences that share a prefill: no more than each of them may use."""
        leader = family[0]
        if not _takes_part(leader):
            return NOTHING
        most, cached = min(map(self._most_cached, family)), self._roster.seats.cached
        leader.found = cached.find(leader.block_keys, most, leader.found)
        return leader.found

    def _most_cached(self, sequence: Sequence) -> int:
        """Tokens of its prompt that need not be computed."""
        if not _takes_part(sequence):
            return 0
        retention, length = sequence.request.retention, sequence.prompt_tokens
        return length - least_computed_tokens(retention, length, self._max_model_len)

    def _leave_group(self, sequence: Sequence) -> None:
        """Take the slot of a sequence that ended, or was refused, while its group was under way."""
        if sequence.is_finished:
            self._roster.vacate(sequence)
        else:
            self._roster.requeue(sequence)


def _computed(sequence: Sequence, num_cached: int, num_layers: int) -> tuple[int, ...]:
    """Tokens of a sequence's prompt that each layer computes behind so many cached ones, [L]."""
    retention = sequence.request.retention
    entering = retention.entering_tokens(sequence.prompt_tokens, num_layers)
    return computed_tokens(entering, num_cached)


def _takes_part(sequence: Sequence) -> bool:
    """Whether its prefill may use cached blocks, and store others."""
    is_hindered = sequence.scores_prompt or sequence.num_refusals > 0
    return bool(sequence.block_keys) and sequence.reuses_prefix and not is_hindered

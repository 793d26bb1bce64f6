"""What running sequences are fed in a plan: their last token, or several that are known."""

from collections.abc import Sequence as Many

import numpy as np

from saqqara.compression.growth import feeds_single_tokens
from saqqara.workers.plan import DecodeItem

from .demand import Ints
from .draft import Draft
from .roster import Roster
from .sequence import Sequence


class DecodePlanner:
    """Chooses who decodes, and who must make room.

    Args:
        roster: the sequences.
        num_stages: pipeline stages; each plan has a share of the running sequences.
        max_extend_tokens: tokens replayed or scored per plan, all sequences together.
        lookahead: plans in flight that may feed one sequence.
    """

    def __init__(
        self, roster: Roster, *, num_stages: int, max_extend_tokens: int, lookahead: int
    ) -> None:
        self._roster = roster
        self._num_stages = num_stages
        self._max_extend_tokens = max_extend_tokens
        self._lookahead = lookahead

    def plan(self, draft: Draft) -> int:
        """Add what is decoded, replayed and scored; returns how many had to make room."""
        running, ledger = self._roster.running, self._roster.ledger
        num_preempted = 0
        chosen, num_tokens = self._choose()
        if not chosen:
            return 0
        cost_NW = ledger.append_cost(_slots(chosen), num_tokens)
        seats = self._roster.seats
        while chosen and not seats.make_room(cost_NW.sum(axis=0)):
            victim = max(running.values(), key=lambda s: (not self._roster.may_run(s), *s.key))
            stays = np.array([s is not victim for s in chosen])
            if len(running) > 1:
                self._roster.requeue(victim)
                num_preempted += 1
            elif seats.cached.is_filling:
                pass  # it waits for blocks that are idle, or gone, in a moment
            elif ledger.num_held == 1 and self._roster.drop_all_parked():
                pass  # what they share with blocks is idle from the next plan on
            elif ledger.num_held == 1 and seats.use_of(victim.held_slot).cached:
                victim.reuses_prefix = False  # the pool is large enough without blocks, or never
                self._roster.requeue(victim, anew=True)
                num_preempted += 1
            elif ledger.num_held == 1:
                need = ledger.num_pages - ledger.free + cost_NW.sum(axis=0)
                self._roster.finish(victim, "error", error=seats.too_large(need))
            # else it waits for the prompts in prefill, which will make room for it as they decode
            chosen = [s for s in chosen if s is not victim]
            num_tokens, cost_NW = num_tokens[stays], cost_NW[stays]
            seats.release(draft)
        if chosen:
            ledger.append(_slots(chosen), num_tokens, cost_NW)
        for sequence, num in zip(chosen, num_tokens.tolist(), strict=True):
            self._feed(draft, sequence, num)
        return num_preempted

    def resume(self, draft: Draft) -> None:
        """Let those go on whose turn it is and whose rows are parked, as far as there is room."""
        roster, ledger = self._roster, self._roster.ledger
        while (head := roster.head) is not None and head.parked_id is not None:
            if head.num_in_flight > 0:
                return
            if not roster.try_resume(head):
                if ledger.num_held > 0:
                    roster.make_way()
                elif not roster.seats.cached.is_filling:
                    roster.drop_all_parked()  # blocks that they share keep all from running
                return
            draft.new.append(head.new_sequence(resumes=head.resumed_id))
            slots, one = _slots([head]), np.ones(1, dtype=np.int64)
            cost_NW = ledger.append_cost(slots, one)
            if head.num_to_feed > 0 and (cost_NW[0] <= ledger.free).all():
                ledger.append(slots, one, cost_NW)
                self._feed(draft, head, 1)
            else:
                draft.mention(head.held_slot, head)

    def _choose(self) -> tuple[list[Sequence], Ints]:
        """Sequences that are fed in this plan, and how many tokens each."""
        most = -(-len(self._roster.running) // self._num_stages)
        extend_left = self._max_extend_tokens
        chosen: list[Sequence] = []
        num_tokens: list[int] = []
        for sequence in self._roster.running.values():
            num = sequence.num_to_feed
            ready = num > 0 and (sequence.wants_sample or sequence.is_score)
            if not self._roster.may_run(sequence):
                continue
            if not ready or sequence.num_in_flight >= self._most_in_flight(sequence):
                continue
            if num > 1:
                num = min(num, extend_left, self._most_at_once(sequence, num))
                extend_left -= num
                if num == 0:
                    continue
            chosen.append(sequence)
            num_tokens.append(num)
            if len(chosen) == most:
                break
        return chosen, np.array(num_tokens, dtype=np.int64)

    def _most_in_flight(self, sequence: Sequence) -> int:
        """Plans that may feed it at once: what a grammar allows depends on the last token."""
        return self._lookahead if sequence.spec.grammar is None else 1

    def _most_at_once(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of these known tokens one step may feed.

        A compaction depends on the tokens before it, so no step spans one. A resumed sequence with
        a decode stage is replayed token by token, by the very steps that it was decoded with;
        scoring feeds pieces that end where rows are compacted, which is the same but for rounding
        (single tokens where cuts go by what decode steps alone report, or where the request wants
        it).
        """
        request = sequence.request
        if request.token_by_token or feeds_single_tokens(request.retention):
            return 1
        room = self._roster.ledger.room(sequence.held_slot)
        if room is None:
            return num_tokens
        return room if sequence.is_score else 1

    def _feed(self, draft: Draft, sequence: Sequence, num_tokens: int) -> None:
        slot = sequence.held_slot
        sample = sequence.wants_sample and num_tokens == sequence.num_to_feed
        draft.decode.append(DecodeItem(slot, sequence.position, num_tokens, sample))
        draft.mention(slot, sequence)
        sequence.position += num_tokens
        if sample:
            draft.sample(slot, sequence)
        running = self._roster.running
        running[sequence.arrival] = running.pop(sequence.arrival)  # planned last of all now


def _slots(sequences: Many[Sequence]) -> Ints:
    return np.array([s.slot for s in sequences], dtype=np.int64)

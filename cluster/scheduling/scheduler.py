"""Which sequences do what in the next step: admission, prefill by layer ranges, decode, preemption.

Pure Python over the ledger's integers: no tensors, no clock, no I/O. Two methods matter:
`schedule()` makes the next plan, `absorb()` takes in what the workers say about the oldest one.
"""

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from saqqara.compression.growth import feeds_single_tokens
from saqqara.workers.plan import (
    DecodeItem,
    NewSequence,
    PrefillGroup,
    SamplingSpec,
    ScoredTokens,
    StepPlan,
    StepResult,
    WorkerInfo,
)

from .events import Event, Finished, NewScores, NewToken, Preempted, Prefilled
from .groups import Group
from .ledger import Ints, Ledger
from .queue import SharedPrompts, WaitingQueue
from .seats import Seats
from .sequence import ErrorCode, FinishReason, Request, Sequence, Status, check_room


@dataclass(slots=True)
class _Draft:
    """A plan in the making and, once it is made, what must be known to absorb its results."""

    free: list[int] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    prefill: list[PrefillGroup] = field(default_factory=list)
    decode: list[DecodeItem] = field(default_factory=list)
    sequences: dict[int, Sequence] = field(default_factory=dict)  # every slot it works on
    sampling: list[int] = field(default_factory=list)
    busy_stages: set[int] = field(default_factory=set)
    num_held: int = 0

    def mention(self, slot: int, sequence: Sequence) -> None:
        self.sequences[slot] = sequence
        sequence.num_in_flight += 1

    def sample(self, slot: int, sequence: Sequence) -> None:
        self.sampling.append(slot)
        sequence.num_sampling += 1

    def is_empty(self) -> bool:
        return not (self.free or self.new or self.prefill or self.decode)


class Scheduler:
    """Decides, step by step, what the workers of one replica do.

    Args:
        workers: every rank's shard, by rank.
        max_num_seqs: slots.
        max_model_len: most tokens of a sequence, prompt and output together.
        max_prefill_tokens: prompt tokens of one prefill group (a longer prompt goes alone). A
            prompt that several sequences share counts once.
        prefill_quantum: layers x tokens of prefill per step while others decode; None: no bound.
        max_extend_tokens: tokens replayed or scored per step, all sequences together.
        lookahead: steps of a sequence that may be in flight. With 2 the results of a step are
            absorbed while the next one runs, and tokens that overran a stop are dropped.
    """

    def __init__(
        self,
        workers: Many[WorkerInfo],
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_prefill_tokens: int = 8192,
        prefill_quantum: int | None = None,
        max_extend_tokens: int = 1024,
        lookahead: int = 1,
    ) -> None:
        if lookahead < 1:
            raise ValueError(f"lookahead must be at least 1, not {lookahead}")
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.max_prefill_tokens = max_prefill_tokens
        self.prefill_quantum = prefill_quantum
        self.max_extend_tokens = max_extend_tokens
        self.lookahead = lookahead
        self._num_added = 0
        self._next_step = 0
        self._waiting = WaitingQueue()
        self._events: list[Event] = []
        self._start_with(workers)

    def _start_with(self, workers: Many[WorkerInfo]) -> None:
        self._seats = Seats(workers, self.max_num_seqs)
        self._stages = sorted({(w.start_layer, w.stop_layer) for w in workers})
        self._flights: deque[tuple[StepPlan, _Draft]] = deque()
        self._absorbing: _Draft | None = None
        self._groups: list[Group] = []
        self._running: dict[int, Sequence] = {}  # by arrival; least recently planned first

    @property
    def ledger(self) -> Ledger:
        """Pages charged on every worker."""
        return self._seats.ledger

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self._stages)

    @property
    def max_in_flight(self) -> int:
        """Plans that may be executing before the oldest is absorbed."""
        return self.num_stages + self.lookahead - 1

    @property
    def num_in_flight(self) -> int:
        """Plans that are executing."""
        return len(self._flights)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences in prefill or decode."""
        return self._seats.num_seated

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is left, no plan executing and no slot still to be freed."""
        return self._seats.is_empty and not (self._waiting or self._flights)

    def add(
        self,
        request: Request,
        spec: SamplingSpec,
        *,
        index: int = 0,
        eos_token_ids: Many[int] = (),
    ) -> Sequence:
        """Queue one choice of a request.

        Raises:
            ValueError: the prompt or continuation is too long, or could never fit the KV pool.
        """
        self.check(request)
        limits = request.limits
        room = self.max_model_len - len(request.prompt_token_ids)
        sequence = Sequence(
            request=request,
            index=index,
            arrival=self._num_added,
            spec=spec,
            stop_token_ids=frozenset(limits.stop_token_ids),
            eos_token_ids=frozenset(() if limits.ignore_eos else eos_token_ids),
            max_output_tokens=room if limits.max_tokens is None else min(limits.max_tokens, room),
        )
        self._num_added += 1
        self._waiting.add(sequence)
        return sequence

    def check(self, request: Request) -> None:
        """Raise a ValueError if the request could never be served."""
        num_tokens = len(request.prompt_token_ids)
        continuation = request.score_continuation
        if num_tokens == 0:
            raise ValueError("prompt must have at least one token")
        if continuation is None:
            check_room(num_tokens, None, self.max_model_len)
        if continuation is not None:
            if not continuation:
                raise ValueError("score_continuation must have at least one token")
            if num_tokens + len(continuation) > self.max_model_len:
                raise ValueError(
                    f"prompt ({num_tokens} tokens) and score_continuation ({len(continuation)}) "
                    f"are longer than max_model_len={self.max_model_len}"
                )
        replay = len(continuation) - 1 if continuation else 0
        try:
            demand = self.ledger.demand(request.retention, num_tokens)
        except ValueError as error:
            raise ValueError(f"retention: {error}") from None
        need = self.ledger.pages_needed(demand, replay)
        if (need > self.ledger.num_pages).any():
            raise ValueError(self._seats.too_large(need))

    def schedule(self) -> StepPlan | None:
        """The next plan, or None if there is nothing to do until a plan in flight is absorbed."""
        if len(self._flights) >= self.max_in_flight:
            return None
        draft = _Draft()
        self._abandon_groups()
        draft.free += self._seats.release()
        num_preempted = self._plan_decode(draft)
        self._advance_groups(draft)
        if num_preempted == 0:
            self._admit(draft)
        self.ledger.settle()
        if draft.is_empty():
            return None
        draft.num_held = self.ledger.num_held
        plan = StepPlan(
            step=self._next_step,
            free=tuple(draft.free),
            new=tuple(draft.new),
            prefill=tuple(draft.prefill),
            decode=tuple(draft.decode),
        )
        self._next_step += 1
        self._flights.append((plan, draft))
        return plan

    def absorb(self, plan: StepPlan, results: Many[StepResult]) -> list[Event]:
        """Take in the results of the oldest plan in flight, one per worker.

        Returns:
            What happened since the last call, in order (also what `schedule` and `finish` did).
        """
        oldest, draft = self._flights.popleft()
        self._absorbing = draft
        assert plan is oldest, f"step {plan.step} is absorbed before step {oldest.step}"
        assert all(r.step == plan.step for r in results), "results of another step"
        refused, prefilled = self._seats.note(draft.sequences, results)
        for sequence in prefilled:
            if not (sequence.is_finished or sequence.discarding):
                counts = self.ledger.kept_of_prompt(_slot(sequence))
                self._events.append(Prefilled(sequence, counts))
        if not self._flights:
            self.ledger.verify([r.pages_free for r in sorted(results, key=lambda r: r.rank)])
        for sequence in draft.sequences.values():
            sequence.num_in_flight -= 1
        for slot in draft.sampling:
            draft.sequences[slot].num_sampling -= 1
        for fault in (fault for result in results for fault in result.faults):
            sequence = draft.sequences[fault.slot]
            if not sequence.discarding:  # else it starts anew, and this was of its last try
                self.finish(sequence, "error", error=fault.message, error_code="computation_failed")
        for slot in refused:
            self._refuse(draft.sequences[slot], alone=draft.num_held == 1)
        self._absorb_tokens(draft, results, refused)
        for sequence in draft.sequences.values():
            if sequence.num_in_flight == 0 and sequence.status is Status.WAITING:
                sequence.discarding = False
        self._absorbing = None
        return self.take_events()

    def requests_in_flight(self) -> list[str]:
        """Ids of the requests in the oldest plan that is not absorbed yet."""
        drafts = [self._absorbing, *(draft for _, draft in self._flights)]
        draft = next((draft for draft in drafts if draft is not None), _Draft())
        return sorted({sequence.request.request_id for sequence in draft.sequences.values()})

    def take_events(self) -> list[Event]:
        """What happened since the last call of this or of `absorb`, in order."""
        events, self._events = self._events, []
        return events

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: str | None = None,
        error_code: ErrorCode = "request_too_large",
    ) -> None:
        """End a sequence, whatever it is doing; its slot is freed in the next plan.

        Only where it is in a prefill group with others does it keep the slot until that group is
        through, because a group keeps its slots.
        """
        if sequence.is_finished:
            return
        if sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self._vacate(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        sequence.error = error
        sequence.error_code = None if error is None else error_code
        self._events.append(Finished(sequence))

    def restart(self, workers: Many[WorkerInfo]) -> None:
        """Go on with new workers that hold nothing: what ran is queued again with its tokens."""
        lost = {id(s): s for s in self._seats.holders}
        lost |= {id(s): s for _, draft in self._flights for s in draft.sequences.values()}
        for sequence in lost.values():
            sequence.num_in_flight = sequence.num_sampling = sequence.position = 0
            sequence.discarding = False
            sequence.slot = None
            if sequence.status in (Status.PREFILL, Status.RUNNING):
                sequence.status = Status.WAITING
                self._waiting.add(sequence)
        self._start_with(workers)

    # Decode ---------------------------------------------------------------------------------------

    def _plan_decode(self, draft: _Draft) -> int:
        """Plan decode, replay and scoring; returns how many sequences had to make room."""
        num_preempted = 0
        chosen, num_tokens = self._choose_decode()
        if not chosen:
            return 0
        cost_NW = self.ledger.append_cost(_slots(chosen), num_tokens)
        while chosen and (cost_NW.sum(axis=0) > self.ledger.free).any():
            victim = max(self._running.values(), key=lambda s: s.key)
            stays = np.array([s is not victim for s in chosen])
            if len(self._running) > 1:
                self._requeue(victim)
                num_preempted += 1
            elif self.ledger.num_held == 1:
                need = self.ledger.num_pages - self.ledger.free + cost_NW.sum(axis=0)
                self.finish(victim, "error", error=self._seats.too_large(need))
            # else it waits for the prompts in prefill, which will make room for it as they decode
            chosen = [s for s in chosen if s is not victim]
            num_tokens, cost_NW = num_tokens[stays], cost_NW[stays]
            draft.free += self._seats.release()
        if chosen:
            self.ledger.append(_slots(chosen), num_tokens)
        for sequence, num in zip(chosen, num_tokens.tolist(), strict=True):
            self._plan_decode_item(draft, sequence, num)
        return num_preempted

    def _choose_decode(self) -> tuple[list[Sequence], Ints]:
        """Sequences that are fed in this plan, and how many tokens each."""
        most = -(-len(self._running) // self.num_stages)
        extend_left = self.max_extend_tokens
        chosen: list[Sequence] = []
        num_tokens: list[int] = []
        for sequence in self._running.values():
            num = sequence.num_to_feed
            ready = num > 0 and (sequence.wants_sample or sequence.is_score)
            if not ready or sequence.num_in_flight >= self.lookahead:
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
        room = self.ledger.room(_slot(sequence))
        if room is None:
            return num_tokens
        return room if sequence.is_score else 1

    def _plan_decode_item(self, draft: _Draft, sequence: Sequence, num_tokens: int) -> None:
        slot = _slot(sequence)
        sample = sequence.wants_sample and num_tokens == sequence.num_to_feed
        draft.decode.append(DecodeItem(slot, sequence.position, num_tokens, sample))
        draft.mention(slot, sequence)
        sequence.position += num_tokens
        if sample:
            draft.sample(slot, sequence)
        self._running[sequence.arrival] = self._running.pop(sequence.arrival)

    # Prefill --------------------------------------------------------------------------------------

    def _advance_groups(self, draft: _Draft) -> None:
        """Give every group its next layers, the oldest first, one group per stage."""
        for group in list(self._groups):
            self._plan_range(draft, group)

    def _plan_range(self, draft: _Draft, group: Group) -> None:
        stage = next(i for i, (_, stop) in enumerate(self._stages) if group.next_layer < stop)
        if stage in draft.busy_stages:
            return
        draft.busy_stages.add(stage)
        start_layer, stop_layer = group.next_layer, self._stages[stage][1]
        if self.prefill_quantum is not None and self._running:
            stop_layer = min(stop_layer, group.stop_within(self.prefill_quantum))
        draft.prefill.append(PrefillGroup(group.slots, start_layer, stop_layer))
        group.next_layer = stop_layer
        self.ledger.advance_prefill(group.slots, stop_layer)
        for slot, sequence in zip(group.slots, group.sequences, strict=True):
            draft.mention(slot, sequence)
        if stop_layer == self._stages[-1][1]:
            self._end_group(draft, group)

    def _end_group(self, draft: _Draft, group: Group) -> None:
        self._groups.remove(group)
        for slot, sequence in zip(group.slots, group.sequences, strict=True):
            if sequence.is_finished or sequence.discarding:
                self._leave_group(sequence)
                continue
            sequence.status = Status.RUNNING
            sequence.position = sequence.prompt_tokens
            self._running[sequence.arrival] = sequence
            if not sequence.known_after_prompt:
                draft.sample(slot, sequence)

    def _abandon_groups(self) -> None:
        """Drop the groups of which nobody is left that wants to go on."""
        for group in list(self._groups):
            if all(s.is_finished or s.discarding for s in group.sequences):
                self._groups.remove(group)
                for sequence in group.sequences:
                    self._leave_group(sequence)

    # Admission ------------------------------------------------------------------------------------

    def _admit(self, draft: _Draft) -> None:
        """Start one prefill group if stage 0 is free: the head of the queue and its like."""
        if 0 in draft.busy_stages or len(self._groups) >= self.num_stages:
            return
        while (head := self._waiting.head) is not None and head.num_in_flight == 0:
            families = self._form_group(head)
            if families:
                self._start_group(draft, families)
                return
            if self.ledger.num_held > 0:
                return
            need = self._seats.need(head, head.num_replay)
            self.finish(head, "error", error=self._seats.too_large(need))

    def _start_group(self, draft: _Draft, families: list[list[Sequence]]) -> None:
        for leader, *followers in families:
            draft.new.append(leader.new_sequence())
            draft.new += [s.new_sequence(shares_prefill_with=_slot(leader)) for s in followers]
        group = Group.of(families, num_layers=self._stages[-1][1])
        self._groups.append(group)
        self._plan_range(draft, group)

    def _form_group(self, head: Sequence) -> list[list[Sequence]]:
        """Seat the head and, as far as there is room, those behind it with the same retention.

        Each brings along those that can share its prefill, whatever their retention; they cost
        room, but no prefill.

        Returns:
            families: a leader, which is computed, and its followers.
        """
        families: list[list[Sequence]] = []
        tokens_left = self.max_prefill_tokens
        front = list(islice(self._waiting, 2 * self.max_num_seqs))
        shared = SharedPrompts(front)
        for sequence in front:
            is_seated = sequence.status is not Status.WAITING
            is_like_head = sequence.request.retention == head.request.retention
            if is_seated or not is_like_head or sequence.num_in_flight:
                continue
            if families and sequence.prompt_tokens > tokens_left:
                break
            if not self._seats.has_room(sequence):
                break
            self._seat(sequence)
            families.append([sequence])
            tokens_left -= sequence.prompt_tokens
            for follower in shared.followers(sequence):
                if self._seats.has_room(follower):
                    self._seat(follower)
                    families[-1].append(follower)
        return families

    def _seat(self, sequence: Sequence) -> None:
        """Give a waiting sequence a slot, for a prefill that starts in this plan."""
        self._waiting.remove(sequence)
        self._seats.take(sequence)
        sequence.status = Status.PREFILL

    # Leaving --------------------------------------------------------------------------------------

    def _vacate(self, sequence: Sequence) -> None:
        """Take a sequence's slot away; the next plan frees it."""
        self._running.pop(sequence.arrival, None)
        self._seats.vacate(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        """Take a sequence's slot away and let it wait, with its tokens, for another."""
        self._vacate(sequence)
        sequence.status = Status.WAITING
        sequence.position = 0
        sequence.num_preemptions += 1
        sequence.discarding &= sequence.num_in_flight > 0
        self._waiting.add(sequence)
        self._events.append(Preempted(sequence))

    def _leave_group(self, sequence: Sequence) -> None:
        """Take the slot of a sequence that ended, or was refused, while its group was under way."""
        if sequence.is_finished:
            self._vacate(sequence)
        else:
            self._requeue(sequence)

    # Results --------------------------------------------------------------------------------------

    def _refuse(self, sequence: Sequence, *, alone: bool) -> None:
        """Let a sequence that a worker had no pages for try again, unless it had all of them."""
        if sequence.is_finished or sequence.discarding:
            return
        sequence.num_refusals += 1
        if alone:
            fed = max(sequence.position - sequence.prompt_tokens, 0)
            need = self._seats.need(sequence, fed)
            self.finish(sequence, "error", error=self._seats.too_large(need))
            return
        sequence.discarding = True
        if sequence.status is Status.RUNNING:
            self._requeue(sequence)

    def _absorb_tokens(self, draft: _Draft, results: Many[StepResult], refused: Many[int]) -> None:
        sampled = {token.slot: token for result in results for token in result.sampled}
        for slot in draft.sampling:
            sequence = draft.sequences[slot]
            if slot in refused or sequence.discarding or sequence.is_finished:
                continue
            token = sampled[slot]
            expected = sequence.prompt_tokens + len(sequence.output_token_ids)
            assert token.position == expected, f"token {token} should be at {expected}"
            sequence.output_token_ids.append(token.token_id)
            self._events.append(NewToken(sequence, token.token_id, token.logprobs))
            self._check_stop(sequence, token.token_id)
        for scored in (scored for result in results for scored in result.scored):
            sequence = draft.sequences[scored.slot]
            if scored.slot not in refused and not sequence.discarding and not sequence.is_finished:
                self._absorb_scores(sequence, scored)

    def _check_stop(self, sequence: Sequence, token_id: int) -> None:
        num_tokens = len(sequence.output_token_ids)
        may_stop = num_tokens > sequence.request.limits.min_tokens
        if may_stop and token_id in sequence.eos_token_ids:
            self.finish(sequence, "stop")
        elif may_stop and token_id in sequence.stop_token_ids:
            self.finish(sequence, "stop", stop_reason=token_id)
        elif num_tokens >= sequence.max_output_tokens:
            self.finish(sequence, "length")

    def _absorb_scores(self, sequence: Sequence, scored: ScoredTokens) -> None:
        # A preempted sequence is scored again from the start, with the same numbers.
        offset = scored.position - sequence.prompt_tokens
        assert 0 <= offset <= len(sequence.scored_logprobs), f"a gap before {scored}"
        known = len(sequence.scored_logprobs)
        sequence.scored_logprobs[offset:] = scored.logprobs
        sequence.scored_ranks[offset:] = scored.ranks
        best = zip(scored.top_ids, scored.top_logprobs, strict=True)
        sequence.scored_top[offset:] = [dict(zip(*pair, strict=True)) for pair in best]
        num_new = len(sequence.scored_logprobs) - known
        self._events.append(NewScores(sequence, num_new))
        if len(sequence.scored_logprobs) == len(sequence.known_after_prompt):
            self.finish(sequence, "stop")


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _slots(sequences: Many[Sequence]) -> Ints:
    return np.array([s.slot for s in sequences], dtype=np.int64)

"""Which sequences do what in the next step: admission, prefill by layer ranges, decode, preemption.

Pure Python over the ledger's integers: no tensors, no clock, no I/O. Two methods matter:
`schedule()` makes the next plan, `absorb()` takes in what the workers say about the oldest one.
"""

from collections import deque
from collections.abc import Sequence as Many

from saqqara.cluster.outcome import ErrorCode, FinishReason, check_room
from saqqara.cluster.reuse.cached import CachedPrefixes
from saqqara.cluster.reuse.conversations import Conversations
from saqqara.cluster.reuse.parked import HostMemory
from saqqara.workers.plan import SamplingSpec, StepPlan, StepResult, WorkerInfo

from .decode import DecodePlanner
from .demand import Ints
from .draft import Draft
from .events import Event
from .ledger import Ledger
from .prefill import PrefillPlanner
from .results import Landing
from .roster import Roster
from .sequence import Sequence, TokenRequest


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
        prefix_bytes: most bytes of cached prefixes of prompts; None: half the pool, 0: no caching.
        conversation_bytes: most bytes that conversations keep between their turns; None: a quarter
            of the pool and what the host's memory has room for, 0: none.
        conversation_seconds: without a turn, after which one is forgotten.
        lookahead: steps of a sequence that may be in flight. With 2 the results of a step are
            absorbed while the next one runs, and tokens that overran a stop are dropped: what
            engines need whose steps overlap with their controller's work.
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
        prefix_bytes: int | None = 0,
        conversation_bytes: int | None = 0,
        conversation_seconds: float = 600.0,
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
        self._newest: tuple[TokenRequest | None, tuple[bytes, ...]] = (None, ())
        self._next_step = 0
        if conversation_bytes is None:
            conversation_bytes = sum(w.num_pages * w.page_bytes for w in workers) // 4
            conversation_bytes += sum(w.host_kv_bytes for w in workers)
        self.conversations = Conversations(conversation_bytes, conversation_seconds)
        self._roster = Roster(workers, max_num_seqs, prefix_bytes, self.conversations)
        self._start_with(workers)

    def _start_with(self, workers: Many[WorkerInfo]) -> None:
        stages = sorted({(w.start_layer, w.stop_layer) for w in workers})
        self.num_stages = len(stages)
        self._flights: deque[tuple[StepPlan, Draft]] = deque()
        self._absorbing: Draft | None = None
        self._decode = DecodePlanner(
            self._roster,
            num_stages=len(stages),
            max_extend_tokens=self.max_extend_tokens,
            lookahead=self.lookahead,
        )
        self._prefill = PrefillPlanner(
            self._roster,
            stages,
            max_num_seqs=self.max_num_seqs,
            max_prefill_tokens=self.max_prefill_tokens,
            prefill_quantum=self.prefill_quantum,
            max_model_len=self.max_model_len,
        )

    @property
    def ledger(self) -> Ledger:
        """Pages charged on every worker."""
        return self._roster.ledger

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
        return len(self._roster.waiting) + self._roster.preparing

    @property
    def num_held_back(self) -> int:
        """Sequences of those that wait for another request, which runs alone."""
        return sum(not self._roster.may_run(sequence) for sequence in self._roster.waiting)

    @property
    def num_running(self) -> int:
        """Sequences in prefill or decode."""
        return self._roster.seats.num_seated

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is left, no plan executing, and nothing still to be freed."""
        seats = self._roster.seats
        is_empty = seats.is_empty and not seats.has_given_up
        return is_empty and not (self.num_waiting or self._flights)

    def add(
        self,
        request: TokenRequest,
        spec: SamplingSpec,
        *,
        index: int = 0,
        eos_token_ids: Many[int] = (),
        is_ready: bool = True,
    ) -> Sequence:
        """Queue one choice of a request; where it is not ready, `enqueue` does.

        Raises:
            ValueError: the prompt or continuation is too long, or could never fit the KV pool.
        """
        self.check(request)
        sampling = request.sampling
        most = self.max_model_len - len(request.prompt_token_ids)
        if sampling.max_tokens is not None:
            most = min(most, sampling.max_tokens)
        sequence = Sequence(
            request=request,
            index=index,
            arrival=self._num_added,
            spec=spec,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            eos_token_ids=frozenset(() if sampling.ignore_eos else eos_token_ids),
            max_output_tokens=most,
        )
        self._num_added += 1
        self._note_prefix(sequence)
        if sequence.conversation is not None:
            self.conversations.begin(sequence.conversation, request.arrival_time)
        if is_ready:
            self._roster.waiting.add(sequence)
        else:
            self._roster.prepare(sequence)
        return sequence

    def _note_prefix(self, sequence: Sequence) -> None:
        """Give a new sequence the keys of its prompt's blocks; a request's choices count once."""
        request, cached = sequence.request, self._roster.seats.cached
        if request is not self._newest[0]:
            prompt, retention = request.prompt_token_ids, request.retention
            keys = cached.keys(prompt, retention, request.owner, request.cache_salt)
            cached.see(keys)
            self._newest = request, keys
        sequence.block_keys = self._newest[1]

    @property
    def host_memory(self) -> HostMemory:
        """What preempted sequences take of the host's memory, and what has come of them."""
        return self._roster.seats.host

    @property
    def prefixes(self) -> CachedPrefixes:
        """Cached prefixes of prompts."""
        return self._roster.seats.cached

    @property
    def idle_pages(self) -> Ints:
        """Pages, int64 [W], that are as good as free: `Seats.make_room` gives them away."""
        return self._roster.seats.idle_pages

    def end_conversation(self, owner: str, conversation_id: str) -> bool:
        """Give up what is kept of a conversation, by the next plan; whether there was anything.

        Raises:
            ConversationBusyError: a turn of it has not ended.
        """
        return self._roster.seats.end_conversation((owner, conversation_id))

    def has_expired(self, now: float) -> bool:
        """Whether `expire` has something to do."""
        due = self.conversations.next_expiry()
        return due is not None and due <= now

    def expire(self, now: float) -> None:
        """Forget the conversations that had no turn for too long; `now`, in seconds, only grows."""
        self._roster.seats.turns.expire(now)

    def reset_prefix_cache(self) -> bool:
        """Give up all cached prefixes that nobody uses, by the next plan; whether none is left."""
        return self._roster.seats.cached.reset()

    def enqueue(self, sequence: Sequence, error: str | None = None) -> None:
        """Queue a sequence that was not ready when it was added, unless it has ended.

        With an error its grammar cannot be had, and it ends.
        """
        if error is None:
            self._roster.enqueue(sequence)
        else:
            message = f"structured_outputs: {error}"
            self.finish(sequence, "error", error=message, error_code="constraint_failed")

    def check(self, request: TokenRequest) -> None:
        """Raise a ValueError if the request could never be served."""
        if request.conversation_id is not None:
            self.conversations.check((request.owner, request.conversation_id))
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
        need = demand.most(replay)
        if (need > self.ledger.num_pages).any():
            raise ValueError(self._roster.seats.too_large(need))

    def schedule(self) -> StepPlan | None:
        """The next plan, or None if there is nothing to do until a plan in flight is absorbed."""
        if len(self._flights) >= self.max_in_flight:
            return None
        draft = Draft()
        self._prefill.abandon()
        seats = self._roster.seats
        seats.release(draft)
        num_preempted = self._decode.plan(draft)
        self._prefill.advance(draft)
        if num_preempted == 0:
            self._decode.resume(draft)
            self._prefill.admit(draft)
        self.ledger.settle()
        draft.evict += seats.cached.take_evicted()
        draft.park += seats.turns.take_parked()
        draft.offload += seats.turns.take_offloaded()
        draft.give_up([*seats.turns.take_dropped(), *seats.host.take_dropped()])
        seats.host.settle()
        draft.copied_bytes = seats.host.take_copied()
        if draft.is_empty:
            return None
        draft.has_pool_alone = self.ledger.num_held == 1 and not self.ledger.num_set_aside.any()
        plan = draft.plan(self._next_step)
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
        landing = Landing(self._roster, draft, results)
        landing.note_pages()
        self.host_memory.note(results, draft.copied_bytes)
        if not self._flights:
            self.ledger.verify([r.pages_free for r in sorted(results, key=lambda r: r.rank)])
        landing.settle_blocks()
        landing.count_down()
        landing.end_faulty()
        landing.retry_refused()
        landing.take_prompts()
        landing.take_tokens()
        landing.take_scores()
        landing.settle_refused()
        self._absorbing = None
        return self.take_events()

    def started(self) -> list[tuple[Sequence, bool]]:
        """Sequences that the newest plan gives a slot, each with whether it shares a prefill."""
        plan, draft = self._flights[-1]
        return [(draft.sequences[n.slot], n.shares_prefill_with is not None) for n in plan.new]

    def requests_in_flight(self) -> list[str]:
        """Ids of the requests in the oldest plan that is not absorbed yet."""
        drafts = [self._absorbing, *(draft for _, draft in self._flights)]
        draft = next((draft for draft in drafts if draft is not None), Draft())
        return sorted({sequence.request.request_id for sequence in draft.sequences.values()})

    def all_in_flight(self) -> list[str]:
        """Ids of the unfinished requests in any plan that is not absorbed, first come first."""
        found = {s.key: s for _, draft in self._flights for s in draft.sequences.values()}
        sequences = (found[key] for key in sorted(found))
        return list(dict.fromkeys(s.request.request_id for s in sequences if not s.is_finished))

    def take_events(self) -> list[Event]:
        """What happened since the last call of this or of `absorb`, in order."""
        events, self._roster.events = self._roster.events, []
        return events

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: str | None = None,
        error_code: ErrorCode = "request_too_large",
    ) -> None:
        """End a sequence, whatever it is doing; see `Roster.finish`."""
        self._roster.finish(sequence, reason, stop_reason, error, error_code)

    def run_alone(self, request_id: str | None) -> None:
        """Let one request, which is not finished, have the workers to itself; None: all may run.

        Others keep their slots, unless it needs the room, and go on where they were.
        """
        self._roster.alone = request_id

    def restart(self, workers: Many[WorkerInfo]) -> None:
        """Go on with new workers that hold nothing: what ran is queued again with its tokens.

        This is what recovery from a lost rank rests on: a sent token never changes.
        """
        in_flight = [s for _, draft in self._flights for s in draft.sequences.values()]
        self._roster.restart(workers, in_flight)
        self._start_with(workers)

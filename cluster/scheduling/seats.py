"""Slots: who holds which, what it is charged for, and when it is free again."""

import heapq
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from saqqara.cluster.reuse.cached import CachedPrefixes, Use
from saqqara.cluster.reuse.conversations import Anew, Conversations, Kept
from saqqara.cluster.reuse.conversations import Key as Conversation
from saqqara.cluster.reuse.limits import Cuts, most_shared_blocks
from saqqara.cluster.reuse.parked import Counts, HostMemory, next_parked_id
from saqqara.cluster.reuse.prefixes import NOTHING, Found, Prefixes
from saqqara.cluster.reuse.turns import Resumption, Turns
from saqqara.compression.growth import sums_mass
from saqqara.workers.plan import Parking, StepResult, WorkerInfo

from .demand import Charge, Demand, Ints, resumed_demand
from .draft import Draft
from .ledger import Ledger
from .sequence import Sequence

WATERMARK = 100  # a newcomer leaves one page in this many free, unless it is alone


@dataclass(frozen=True, slots=True)
class _Parked:
    """A sequence without a slot whose rows are kept.

    `slot` is what it had, `charge` what that was charged, of them `need` pages [W] are its own.
    """

    slot: int
    charge: Charge
    need: Ints
    use: Use


class Seats:
    """The slots of a replica, with the ledger of what their holders take up.

    A slot that is vacated stays charged until `release` puts it into a plan: workers free slots at
    the start of a step, so from then on slot and pages can be given away.

    Args:
        workers: that hold nothing yet.
        num_slots: of the replica.
        prefixes: which prefixes of prompts are cached; none are any more.
        prefix_bytes: most bytes of them; None: half the pool.
        conversations: which there are; nothing is kept of them any more.
        parked: what has come of sequences that had to make room.

    Attributes:
        ledger: pages charged on every worker.
        cached: prefixes in pages that nobody needs.
        host: memory for sequences and conversations that had to make room.
        turns: what conversations keep until their next turn.
    """

    def __init__(
        self,
        workers: Many[WorkerInfo],
        num_slots: int,
        prefixes: Prefixes,
        prefix_bytes: int | None = 0,
        conversations: Conversations | None = None,
        parked: Counts | None = None,
    ) -> None:
        self.ledger = Ledger(workers, num_slots)
        most = self.ledger.most_blocks(prefix_bytes)
        most_shared = most_shared_blocks(workers, self.ledger.rows_per_worker.tolist())
        page_tokens = self.ledger.page_tokens
        cuts = Cuts(workers)
        self.cached = CachedPrefixes(prefixes, self.ledger, most, page_tokens, cuts, most_shared)
        if conversations is None:
            conversations = Conversations(0, 1.0)
        host_bytes_W = np.array([w.host_kv_bytes for w in workers], dtype=np.int64)
        self.host = HostMemory(host_bytes_W, parked or Counts())
        self._num_layers = sum(w.stop_layer - w.start_layer for w in workers)
        layers = self._num_layers
        self.turns = Turns(conversations, self.ledger, self.cached, self.host, layers)
        self._staying: set[int] = set()
        self._parked: dict[int, _Parked] = {}  # by parked id
        self._leaving: dict[int, int] = {}  # parked ids by slots that no plan has freed yet
        self._uses: dict[int, Use] = {}
        self._landing: dict[Conversation, Sequence] = {}  # turns that left with a step in flight
        self._holders: dict[int, Sequence] = {}
        self._vacated: list[int] = []
        self._free = list(range(num_slots))

    @property
    def num_seated(self) -> int:
        """Sequences that have a slot."""
        return len(self._holders) - len(self._vacated)

    @property
    def is_empty(self) -> bool:
        """Whether every slot is free, on the workers, too."""
        return not self._holders

    @property
    def has_given_up(self) -> bool:
        """Whether the workers have yet to be told of blocks or parked sequences that are gone."""
        return self.cached.has_evicted or self.turns.has_dropped or self.host.has_dropped

    @property
    def holders(self) -> Iterable[Sequence]:
        """Sequences that hold a slot or held one that is not released yet."""
        return self._holders.values()

    @property
    def idle_pages(self) -> Ints:
        """Pages, int64 [W], that no sequence needs: idle blocks' and waiting conversations'."""
        return self.cached.idle_pages + self.turns.idle_pages

    def make_room(self, need_W: Ints) -> bool:
        """Have so many pages free on every worker, int64 [W]; False, and nothing goes, if not.

        What nobody needs now goes first: blocks of prefixes that no sequence uses, then what
        conversations keep there, to the host's memory or for good.
        """
        if (need_W > self.ledger.free + self.idle_pages).any():
            return False
        self.cached.give(need_W)
        self.turns.give(need_W)
        return True

    def try_take(self, sequence: Sequence, found: Found = NOTHING) -> bool:
        """Give a sequence a slot, if there is one, and the pages expected, and some to spare.

        It is charged what it is expected to need. Of its prompt it uses the blocks that were
        `found`, and fills others, as far as there is room beyond that.
        """
        if not self._free:
            return False
        going_on = self._going_on(sequence)
        if isinstance(going_on, Resumption):
            if self._try_take(sequence, NOTHING, going_on):
                self.turns.count(going_on)
                return True
            if self.ledger.num_held:
                return False
            going_on = "lost"  # alone, and there is no room beside what it has
        # Alone it may have the whole pool: blocks that it would use may not keep it waiting.
        is_alone = self.ledger.num_held == 0 and bool(found.blocks)
        is_taken = self._try_take(sequence, found)
        if not is_taken and not (is_alone and self._try_take(sequence, NOTHING)):
            return False
        if sequence.conversation is not None and going_on is not None:
            self.turns.begin_anew(sequence.conversation, going_on)
        return True

    def is_landing(self, sequence: Sequence) -> bool:
        """Whether a worker may yet refuse the turn before, and so lack what others go on from."""
        before = self._landing.get(sequence.conversation) if sequence.conversation else None
        return before is not None and before.num_in_flight > 0

    def resumable_tokens(self, sequence: Sequence) -> int:
        """Tokens of its prompt that its conversation has now."""
        found = self._going_on(sequence)
        return found.num_tokens if isinstance(found, Resumption) else 0

    def _going_on(self, sequence: Sequence) -> Resumption | Anew | None:
        """How it goes on from its conversation, or why not; None: it has none, or begins it."""
        if sequence.conversation is None:
            return None
        retention = sequence.request.retention
        return self.turns.find(sequence.conversation, sequence.prompt_array, retention)

    def _try_take(
        self, sequence: Sequence, found: Found, going_on: Resumption | None = None
    ) -> bool:
        ledger, request = self.ledger, sequence.request
        demand, held, moment_W = self._demand(sequence), None, np.zeros_like(ledger.free)
        if going_on is not None:
            use, held = going_on.kept.use, going_on.rows
            num_new = sequence.prompt_tokens - going_on.num_tokens
            demand = resumed_demand(demand, held, num_new, ledger.workers)
            moment_W = self.turns.begin(going_on)
        else:
            if ledger.num_held == 0 and sequence.num_refusals:
                self.cached.reset()  # it was refused beside them
                self.turns.reset()
            may_cut = sequence.conversation is not None and request.retention.score is not None
            use = self.cached.use(found, request.retention, sequence.prompt_tokens, may_cut)
        need_W = demand.most(sequence.num_replay) - ledger.shared_pages(use.num_shared)
        if not self.make_room(np.maximum(need_W + self._spare(sequence, need_W), moment_W)):
            if going_on is not None:
                self.turns.undo(going_on)
            else:
                self.cached.undo(use)
            return False
        slot = heapq.heappop(self._free)
        replay, shared = sequence.num_replay, use.num_shared
        ledger.admit(slot, demand, sequence.prompt_tokens, replay, shared, held)
        if going_on is None:
            growth_W = (ledger.num_held + 1) * ledger.rows_per_worker
            self.cached.store(use, found, np.maximum(growth_W, ledger.num_pages // WATERMARK))
        self._holders[slot] = sequence
        self._uses[slot] = use
        sequence.slot, sequence.resumption = slot, going_on
        if sequence.num_preemptions == 0:
            num_cached = len(use.cached) * ledger.page_tokens
            sequence.num_cached_tokens = sequence.resumed_tokens or num_cached
            num_stored = 0 if going_on is not None else len(use.stored)
            sequence.num_stored_tokens = num_stored * ledger.page_tokens
        return True

    def _spare(self, sequence: Sequence, need_W: Ints) -> Ints:
        """Pages, int64 [W], that stay free beside what a newcomer needs."""
        ledger = self.ledger
        if ledger.num_held == 0:
            return np.zeros_like(need_W)
        if sequence.num_preemptions == 0:
            return ledger.num_pages // WATERMARK
        # Once more for nothing would cost a prefill: let all grow by a page per row first.
        spare: Ints = (ledger.num_held + 1) * ledger.rows_per_worker
        return spare + sequence.num_refusals * need_W

    def use_of(self, slot: int) -> Use:
        """What the sequence in a slot has to do with blocks."""
        return self._uses[slot]

    def vacate(self, sequence: Sequence, *, stays: bool = False) -> None:
        """Take a sequence's slot away; the next plan frees it.

        With `stays` what its rows hold is kept for the next turn of its conversation.
        """
        assert sequence.slot is not None
        self._vacated.append(sequence.slot)
        if stays:
            self._staying.add(sequence.slot)
        sequence.slot = None

    def release(self, draft: Draft) -> None:
        """Have the plan in the making free slots; they and their pages can be used at once."""
        for slot in self._vacated:
            sequence, use = self._holders.pop(slot), self._uses.pop(slot)
            parked_id = self._leaving.pop(slot, None)
            kept = self._kept_of(slot, sequence, use) if slot in self._staying else None
            self.ledger.release(slot)
            if parked_id is not None:
                draft.park.append(Parking(slot, parked_id))
                self.host.begin(parked_id)
            elif kept is not None and sequence.conversation is not None:
                self.turns.keep(sequence.conversation, slot, kept)
                sequence.left_id = kept.parked_id
                self._landing[sequence.conversation] = sequence
            else:
                self.cached.leave(use)
            heapq.heappush(self._free, slot)
        self._landing = {key: s for key, s in self._landing.items() if s.num_in_flight}
        self._staying.clear()
        draft.free += self._vacated
        self._vacated = []

    def park(self, sequence: Sequence) -> bool:
        """Take a sequence's slot away and keep its rows in the host's memory, if these have room.

        Its prefill has ended, on every worker; else it is not known what its rows are.
        """
        slot = sequence.held_slot
        if not self.ledger.is_exact(slot):
            return False
        bytes_W = self._host_bytes(sequence, slot)
        if not self.host.is_worth(bytes_W, sequence.position * self._num_layers):
            return False
        self.turns.make_room_on_host(bytes_W)
        parked_id = self.host.put(bytes_W)
        if parked_id is None:
            return False
        charge, need = self.ledger.copy_of(slot), self.ledger.charged(slot)
        self._parked[parked_id] = _Parked(slot, charge, need, self._uses[slot])
        self._leaving[slot] = sequence.parked_id = parked_id
        self.vacate(sequence)
        return True

    def try_resume(self, sequence: Sequence) -> bool:
        """Give a parked sequence a slot, if there is one and its pages are free; some to spare."""
        assert sequence.parked_id is not None
        parked = self._parked[sequence.parked_id]
        if not self._free or not self.make_room(parked.need + self._spare(sequence, parked.need)):
            return False
        self.host.resume(sequence.parked_id)
        del self._parked[sequence.parked_id]
        slot = heapq.heappop(self._free)
        self.ledger.restore(slot, parked.charge)
        self._holders[slot], self._uses[slot] = sequence, parked.use
        sequence.slot, sequence.resumed_id, sequence.parked_id = slot, sequence.parked_id, None
        return True

    def drop(self, sequence: Sequence) -> None:
        """Give up what is kept of a parked sequence, if anything is."""
        if sequence.parked_id is None:
            return
        parked = self._parked.pop(sequence.parked_id)
        if self._leaving.get(parked.slot) == sequence.parked_id:
            del self._leaving[parked.slot]
            self.host.cancel(sequence.parked_id)
        else:
            self.host.drop(sequence.parked_id)
            self.cached.leave(parked.use)
        sequence.parked_id = None

    def forget_resumed(self, sequence: Sequence) -> None:
        """A worker has refused a sequence: if it was resumed, what it came from may still be there.

        Workers that have put it back pass over the id.
        """
        if sequence.resumed_id is not None:
            self.host.forget(sequence.resumed_id)
            sequence.resumed_id = None

    def forget_left(self, sequence: Sequence) -> None:
        """A worker has refused a turn after its end: it has nothing of what the turn has left."""
        if sequence.conversation is not None and sequence.left_id is not None:
            self.turns.lose(sequence.conversation, sequence.left_id)

    def _host_bytes(self, sequence: Sequence, slot: int) -> Ints:
        """Bytes, int64 [W], that the sequence of a slot takes in the host's memory, at most."""
        ledger = self.ledger
        page_bytes_W = np.array([w.page_bytes for w in ledger.workers], dtype=np.int64)
        bytes_W: Ints = ledger.pages_of(slot) * page_bytes_W
        bytes_W += self._demand(sequence).ring_bytes
        if sums_mass(sequence.request.retention):
            tokens = int(ledger.kept_of_prompt(slot).max()) + sequence.position
            bytes_W += 4 * tokens * ledger.rows_per_worker
        return bytes_W

    def note(
        self, sequences: Mapping[int, Sequence], results: Many[StepResult]
    ) -> tuple[list[int], list[Sequence]]:
        """Bring the ledger up to date with a step that worked on `sequences`, by slot.

        Returns:
            slots that some worker refused, and sequences all of whose rows are known now.
        """
        refused: dict[int, None] = {}
        known: list[Sequence] = []
        for result in results:
            for slot in result.refused:
                refused[slot] = None
                if self._holders.get(slot) is sequences[slot]:
                    self.ledger.set_refused(slot, result.rank)
            for kept in result.kept:
                sequence = sequences[kept.slot]
                if self._holders.get(kept.slot) is not sequence:
                    continue  # freed by a plan that is still in flight
                self.ledger.set_kept(kept.slot, result.rank, kept.counts)
                if sequence.slot is not None and self.ledger.is_exact(kept.slot):
                    known.append(sequence)
        return list(refused), known

    def _kept_of(self, slot: int, sequence: Sequence, use: Use) -> Kept | None:
        """What a turn has left; None: the next one cannot go on from it."""
        request, ledger = sequence.request, self.ledger
        known = (*request.prompt_token_ids, *sequence.output_token_ids)
        if sequence.position > len(known) or not ledger.is_exact(slot):
            return None
        pages_W = ledger.pages_of(slot)
        return Kept(
            parked_id=next_parked_id(),
            token_ids=np.array(known[: sequence.position], dtype=np.int32),
            retention=request.retention,
            rows=ledger.rows_of(slot, sequence.position - sequence.prompt_tokens),
            is_whole=request.retention.score is None and not ledger.layers.local_layers,
            pages=pages_W,
            host_bytes=self._host_bytes(sequence, slot),
            num_bytes=ledger.bytes_of(pages_W) + int(self._demand(sequence).ring_bytes.sum()),
            use=use,
            last_used=self.turns.conversations.now,
        )

    def end_conversation(self, key: Conversation) -> bool:
        """Forget a conversation, one whose last turn has just ended, too; see `Turns.end`."""
        is_known = self.turns.end(key)
        for slot in list(self._staying):
            if self._holders[slot].conversation == key:
                self._staying.discard(slot)
                self.turns.conversations.counts.ended += 1
                is_known = True
        return is_known

    def need(self, sequence: Sequence, fed_tokens: int) -> Ints:
        """Pages, int64 [W], that a sequence is expected to need once so much is fed to it."""
        return self._demand(sequence).most(fed_tokens)

    def too_large(self, need: Ints) -> str:
        """The error of a sequence that needs more than the whole pool."""
        rank = int(np.argmax(need - self.ledger.num_pages))
        return (
            f"the KV cache of this sequence alone does not fit: worker {rank} has "
            f"{self.ledger.num_pages[rank]} pages, about {need[rank]} are needed; raise "
            "kv_memory_gib, or lower budget or the length"
        )

    def _demand(self, sequence: Sequence) -> Demand:
        return self.ledger.demand(sequence.request.retention, sequence.prompt_tokens)

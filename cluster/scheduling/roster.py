"""Where every sequence stands, and the moves between: waiting, in prefill, running, finished."""

from collections.abc import Iterable
from collections.abc import Sequence as Many
from itertools import islice, takewhile

from saqqara.cluster.outcome import ErrorCode, FinishReason
from saqqara.cluster.reuse.conversations import Conversations
from saqqara.cluster.reuse.parked import Counts
from saqqara.cluster.reuse.prefixes import NOTHING, Found, Prefixes
from saqqara.cluster.reuse.turns import why_not_resumed
from saqqara.workers.plan import WorkerInfo

from .events import Event, Finished, Preempted
from .ledger import Ledger
from .queue import WaitingQueue
from .seats import Seats
from .sequence import Sequence, Status


class Roster:
    """The sequences of a replica.

    Attributes:
        preparing: how many sequences are not in the queue yet, because their grammar is not ready.
        waiting: sequences without a slot, in the order of their turns.
        running: those that decode, by arrival; the least recently planned first.
        seats: who holds which slot.
        prefixes: which prefixes of prompts are cached, and what was seen of others.
        parked: what has come of sequences that had to make room.
        events: what happened and nobody has been told yet.
        alone: id of the one request that may run; None: all may.

    Args:
        workers: every rank's shard, by rank.
        num_slots: of the replica.
        prefix_bytes: most bytes of cached prefixes; None: half the pool, 0: none are cached.
        conversations: which there are; default: nothing is kept of any.
    """

    def __init__(
        self,
        workers: Many[WorkerInfo],
        num_slots: int,
        prefix_bytes: int | None = 0,
        conversations: Conversations | None = None,
    ) -> None:
        self._num_slots = num_slots
        self._prefix_bytes = prefix_bytes
        self.prefixes = Prefixes()
        self.parked = Counts()
        self.conversations = Conversations(0, 1.0) if conversations is None else conversations
        self.preparing = 0
        self.waiting = WaitingQueue()
        self.running: dict[int, Sequence] = {}
        self.seats = self._new_seats(workers)
        self.events: list[Event] = []
        self.alone: str | None = None

    @property
    def ledger(self) -> Ledger:
        """Pages charged on every worker."""
        return self.seats.ledger

    @property
    def head(self) -> Sequence | None:
        """The waiting sequence whose turn it is, of those that may run."""
        if self.alone is None:
            return self.waiting.head
        return next(filter(self.may_run, self.waiting), None)

    def front(self, num_sequences: int) -> list[Sequence]:
        """The first waiting sequences of those that may run, at most so many.

        They are to be prefilled, so none whose rows are parked is among them, or before them.
        """
        waiting = self.waiting if self.alone is None else filter(self.may_run, self.waiting)
        return list(islice(takewhile(lambda s: s.parked_id is None, waiting), num_sequences))

    def may_run(self, sequence: Sequence) -> bool:
        """Whether plans may start or feed a sequence; its slot it keeps in any case."""
        return self.alone is None or sequence.request.request_id == self.alone

    def make_way(self) -> None:
        """Take the slots away of those that run no more, for the request that runs alone."""
        for sequence in list(self.running.values()):
            if not self.may_run(sequence):
                self.requeue(sequence)

    def prepare(self, sequence: Sequence) -> None:
        """Keep a new sequence out of the queue until `enqueue`."""
        sequence.status = Status.PREPARING
        self.preparing += 1

    def enqueue(self, sequence: Sequence) -> None:
        """Let a sequence wait for a slot; one that has ended stays so."""
        if sequence.status is Status.PREPARING:
            self.preparing -= 1
            sequence.status = Status.WAITING
            self.waiting.add(sequence)

    def try_seat(self, sequence: Sequence, found: Found = NOTHING) -> bool:
        """Give a waiting sequence a slot, for a prefill that starts in this plan, if it can be.

        Args:
            sequence: that waits.
            found: blocks of its prompt.
        """
        if not self.seats.try_take(sequence, found):
            return False
        self.waiting.remove(sequence)
        sequence.status, sequence.found = Status.PREFILL, NOTHING
        return True

    def try_resume(self, sequence: Sequence) -> bool:
        """Let a waiting sequence whose rows are parked go on decoding, if there is room."""
        if not self.seats.try_resume(sequence):
            return False
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        self.running[sequence.arrival] = sequence
        return True

    def drop_parked(self, sequence: Sequence) -> None:
        """Compute a waiting sequence again whose rows are parked, if they are."""
        if sequence.parked_id is not None:
            self.seats.drop(sequence)
            sequence.position = 0

    def drop_all_parked(self) -> bool:
        """Compute all waiting sequences again; whether there was any whose rows were parked."""
        parked = [sequence for sequence in self.waiting if sequence.parked_id is not None]
        for sequence in parked:
            self.drop_parked(sequence)
        return bool(parked)

    def run(self, sequence: Sequence) -> None:
        """Let a sequence decode whose prompt is through all layers."""
        sequence.status = Status.RUNNING
        sequence.position = sequence.prompt_tokens
        self.running[sequence.arrival] = sequence

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
        has_run = sequence.status is not Status.WAITING or sequence.num_preemptions > 0
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
            self.seats.drop(sequence)
        elif sequence.status is Status.RUNNING:
            if self.ledger.is_exact(sequence.held_slot):
                fed = max(len(sequence.known_after_prompt) - 1, 0)  # nothing follows the last one
                sequence.kv_cache = self.ledger.kept(sequence.held_slot, fed)
        elif sequence.status is Status.PREPARING:
            self.preparing -= 1
        sequence.finish_reason = reason
        stays = self._end_turn(sequence)
        if sequence.status is Status.RUNNING:
            self.vacate(sequence, stays=stays)
        sequence.status = Status.FINISHED
        self.waiting.settle(sequence, has_run=has_run)
        sequence.stop_reason = stop_reason
        sequence.error = error
        sequence.error_code = None if error is None else error_code
        self.events.append(Finished(sequence))

    def vacate(self, sequence: Sequence, *, stays: bool = False) -> None:
        """Take a sequence's slot away; the next plan frees it; see `Seats.vacate`."""
        self.running.pop(sequence.arrival, None)
        self.seats.vacate(sequence, stays=stays)

    def requeue(self, sequence: Sequence, *, anew: bool = False) -> None:
        """Take a sequence's slot away and let it wait, with its tokens, for another.

        What its rows hold is parked, if that is known and there is room; else, and where it is to
        be computed `anew`, its prompt is prefilled again.
        """
        is_whole = sequence.status is Status.RUNNING and not sequence.discarding
        if is_whole and not anew and self.seats.park(sequence):
            del self.running[sequence.arrival]
        else:
            self.vacate(sequence)
            sequence.position = 0
        sequence.status = Status.WAITING
        sequence.num_preemptions += 1
        sequence.resumption = None
        sequence.discarding &= sequence.num_in_flight > 0
        self.waiting.add(sequence)
        self.events.append(Preempted(sequence))

    def restart(self, workers: Many[WorkerInfo], in_flight: Iterable[Sequence]) -> None:
        """Take the slots of all away, `in_flight` and others; who is not finished waits again."""
        lost = {id(sequence): sequence for sequence in (*self.seats.holders, *in_flight)}
        lost |= {id(s): s for s in self.waiting if s.parked_id is not None}
        for sequence in lost.values():
            sequence.num_in_flight = sequence.num_sampling = sequence.position = 0
            sequence.discarding = False
            sequence.slot = sequence.parked_id = sequence.resumed_id = None
            sequence.resumption = None
            if sequence.status in (Status.PREFILL, Status.RUNNING):
                sequence.status = Status.WAITING
                self.waiting.add(sequence)
        self.running = {}
        self.seats = self._new_seats(workers)

    def _new_seats(self, workers: Many[WorkerInfo]) -> Seats:
        kept = self.prefixes, self._prefix_bytes, self.conversations, self.parked
        return Seats(workers, self._num_slots, *kept)

    def _end_turn(self, sequence: Sequence) -> bool:
        """A sequence ends; whether what its rows hold stays for the next turn of a conversation."""
        key = sequence.conversation
        if key is None:
            return False
        self.conversations.end(key)
        reason = why_not_resumed(sequence.request.retention)
        if self.conversations.get(key) is None:
            self.conversations.lose(key, reason or "lost")  # unless it is kept in a moment
        is_kept = reason is None and self.conversations.max_bytes > 0
        return is_kept and sequence.finish_reason in ("stop", "length")

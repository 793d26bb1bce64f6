"""Bugs that tests plant, to show that random schedules of faults find them."""

from collections.abc import Callable
from typing import Any

import pytest

from saqqara.cluster.recovery.deadline import StepDeadline
from saqqara.cluster.recovery.flights import Flights
from saqqara.cluster.recovery.outage import Outage
from saqqara.cluster.recovery.suspects import Suspects
from saqqara.cluster.scheduling.ledger import Ledger
from saqqara.cluster.scheduling.pages import TabulatedPages
from saqqara.cluster.scheduling.roster import Roster
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import Status

Plant = Callable[[pytest.MonkeyPatch], None]


def forget_nothing_in_flight(patch: pytest.MonkeyPatch) -> None:
    restart = Roster.restart
    patch.setattr(Roster, "restart", lambda self, workers, in_flight: restart(self, workers, []))


def lose_who_decodes(patch: pytest.MonkeyPatch) -> None:
    restart = Roster.restart

    def bad(self: Roster, workers: Any, in_flight: Any) -> None:
        for sequence in list(self.running.values())[:1]:
            self.vacate(sequence)
            sequence.status = Status.FINISHED
        restart(self, workers, in_flight)

    patch.setattr(Roster, "restart", bad)


def repeat_a_token(patch: pytest.MonkeyPatch) -> None:
    restart = Roster.restart

    def bad(self: Roster, workers: Any, in_flight: Any) -> None:
        for sequence in self.running.values():
            if sequence.output_token_ids:
                sequence.output_token_ids.pop()
        restart(self, workers, in_flight)

    patch.setattr(Roster, "restart", bad)


def keep_positions(patch: pytest.MonkeyPatch) -> None:
    restart = Roster.restart

    def bad(self: Roster, workers: Any, in_flight: Any) -> None:
        sampling = {s: s.num_sampling for s in self.running.values()}
        restart(self, workers, in_flight)
        for sequence, num in sampling.items():
            sequence.num_sampling = num

    patch.setattr(Roster, "restart", bad)


def absorb_what_is_stale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flights, "drop", lambda self: None)


def never_clear_a_suspect(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Suspects, "forget", lambda self, request_id: False)


def blame_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("saqqara.cluster.recovery.suspects.LOSSES_OF_A_GUILTY", 1)


def hear_of_no_loss_between_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outage, "is_over", lambda self: True)


def count_the_pages_of_lost_workers(patch: pytest.MonkeyPatch) -> None:
    restart = Scheduler.restart
    patch.setattr(Scheduler, "restart", lambda self, new: restart(self, self.ledger.workers))


def wait_for_a_hung_step_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepDeadline, "seconds", lambda self, work: 1e9)


def keep_pages_of_who_leaves(patch: pytest.MonkeyPatch) -> None:
    release = Ledger.release

    def bad(self: Ledger, slot: int) -> None:
        free = self.free.copy()
        release(self, slot)
        if self.num_held > 0:
            self.free[:] = free

    patch.setattr(Ledger, "release", bad)


def give_back_what_is_cut_too_early(patch: pytest.MonkeyPatch) -> None:
    feed = TabulatedPages.feed

    def bad(self: TabulatedPages, slots: Any, num_tokens: Any) -> Any:
        return feed(self, slots, num_tokens) * 2

    patch.setattr(TabulatedPages, "feed", bad)


def lose_a_token_of_who_is_preempted(patch: pytest.MonkeyPatch) -> None:
    requeue = Roster.requeue

    def bad(self: Roster, sequence: Any) -> None:
        requeue(self, sequence)
        sequence.output_token_ids[-1:] = []

    patch.setattr(Roster, "requeue", bad)


QUICKLY_FOUND: tuple[Plant, ...] = (
    repeat_a_token,
    keep_positions,
    absorb_what_is_stale,
    blame_at_once,
    count_the_pages_of_lost_workers,
    keep_pages_of_who_leaves,
    lose_a_token_of_who_is_preempted,
)
"""Within some schedules, and at once."""

PLANTS: tuple[Plant, ...] = (
    *QUICKLY_FOUND,
    forget_nothing_in_flight,
    lose_who_decodes,
    never_clear_a_suspect,
    hear_of_no_loss_between_steps,
    wait_for_a_hung_step_for_ever,
    give_back_what_is_cut_too_early,
)

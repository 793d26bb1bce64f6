"""Random faults in random settings: no request is lost, ended twice or left, and all adds up.

A schedule is its seed: a failing one can be run again, step by step.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from support.fake_clock import FakeClock
from support.fake_model import SPEC, Ascii, continue_text, greedy
from support.fake_replica import make_workers
from support.fragile_replica import FragileReplica

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.errors import Cause
from saqqara.cluster.recovery.attempts import RecoveryLimits
from saqqara.cluster.recovery.deadline import StepDeadline
from saqqara.cluster.recovery.flights import Flights
from saqqara.cluster.recovery.outage import Outage
from saqqara.cluster.recovery.suspects import Suspects
from saqqara.cluster.request import Request, RequestOutput
from saqqara.cluster.scheduling.roster import Roster
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import Status
from saqqara.configs.schema import EngineConfig

CAUSES: tuple[Cause, ...] = ("died", "failed", "hung", "unreachable")
RETENTIONS = (
    None,
    {"method": "pyramidkv", "window": 3, "sinks": 1, "budget": 12},
    {"method": "snapkv", "window": 3, "budget": 12, "decode": {"slack_pages": 1}},
)
NUM_TOKENS = 14
MOST_STEPS = 3000  # several times what the longest takes


class Schedule:
    """What a seed stands for: requests, workers, and when they are lost."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        losses: dict[int, Cause] = {}
        step = 0
        while step < 300:
            step += rng.randint(1, 60)
            for _ in range(rng.choice([1, 1, 2])):
                losses[step] = rng.choice(CAUSES)
                step += 1
        self.clock = FakeClock()
        self.replica = FragileReplica(
            make_workers(
                rng.choice([60, 80, 120, 1000]), stages=rng.choice([(4,), (2, 2), (1, 2, 1)])
            ),
            losses,
            failing_starts=rng.choice([0, 0, 3]),
            stale=rng.random() < 0.5,
        )
        self.clock.on_wait = self._pass_time
        config = EngineConfig(
            model="fake",
            executor="ray",
            check_integrity=True,
            max_num_seqs=rng.choice([2, 4, 8]),
            prefill_quantum=rng.choice([None, 8]),
            max_extend_tokens=rng.choice([4, 1024]),
        )
        self.engine = Engine(
            config,
            self.replica,
            Tokenizer(Ascii()),
            SPEC,
            lookahead=rng.choice([1, 2, 3]),
            limits=RecoveryLimits(max_attempts=50),
            clock=self.clock,
        )
        self.names = [f"{'x' * rng.randint(0, 12)}{i}" for i in range(rng.randint(1, 12))]
        self.aborted = {name for name in self.names if rng.random() < 0.1}
        self.finished: Counter[str] = Counter()
        self.lengths: Counter[str] = Counter()
        self.rng = rng

    def run(self) -> None:
        """Requests come one after the other, and some are taken back; then wait for all."""
        waiting = list(self.names)
        open_names: list[str] = []
        for _ in range(MOST_STEPS):
            if waiting and self.rng.random() < 0.2:
                open_names.append(waiting.pop(0))
                self._add(open_names[-1])
            if open_names and self.rng.random() < 0.02:
                name = self.rng.choice(open_names)
                if name in self.aborted:
                    self.engine.abort(name)
            for output in self.engine.step():
                self._check(output)
            if not waiting and not self.engine.has_unfinished():
                return
        raise AssertionError("something is left for ever")

    def _pass_time(self) -> None:
        assert self.clock.time < 100_000, "this takes a day"
        self.replica.tick()

    def _add(self, name: str) -> None:
        retention = self.rng.choice(RETENTIONS)
        params = greedy(max_tokens=NUM_TOKENS)
        self.engine.add(Request(name, name, params, retention=retention, stream=True))

    def _check(self, output: object) -> None:
        assert isinstance(output, RequestOutput)
        name, [choice] = output.request_id, output.outputs
        assert self.finished[name] == 0, "nothing comes after the end"
        expected = tuple(continue_text(name, NUM_TOKENS)[1])
        assert choice.token_ids == expected[: len(choice.token_ids)]
        assert output.finished or len(choice.token_ids) == self.lengths[name] + 1
        self.lengths[name] = len(choice.token_ids)
        if output.finished:
            self.finished[name] += 1
            if choice.finish_reason == "abort":
                assert name in self.aborted
            elif choice.finish_reason == "error":  # bad luck, of which it could not be cleared
                assert output.error is not None
                assert "has ended the workers 3 times while it ran alone" in output.error
                assert self.replica.lost_alone[output.prompt_token_ids] >= 3
            else:
                assert choice.finish_reason == "length"
                assert choice.token_ids == expected


def run_schedule(seed: int) -> FragileReplica:
    schedule = Schedule(seed)
    schedule.run()
    assert schedule.finished == dict.fromkeys(schedule.names, 1), f"seed {seed}"
    report = schedule.engine.report()
    assert report.pages_leaked == 0, f"seed {seed}"
    assert sum(report.recoveries.values()) == schedule.replica.num_starts
    return schedule.replica


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_no_schedule_loses_a_request(first: int) -> None:
    replicas = [run_schedule(seed) for seed in range(first, first + 20)]
    assert sum(replica.num_starts for replica in replicas) > 20


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


PLANTS: tuple[Plant, ...] = (
    forget_nothing_in_flight,
    lose_who_decodes,
    repeat_a_token,
    keep_positions,
    absorb_what_is_stale,
    never_clear_a_suspect,
    blame_at_once,
    hear_of_no_loss_between_steps,
    count_the_pages_of_lost_workers,
    wait_for_a_hung_step_for_ever,
)


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bugs_are_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(100):
        try:
            run_schedule(seed)
        except Exception:
            return
    raise AssertionError("nothing was found in 100 schedules")

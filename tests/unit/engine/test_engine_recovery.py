"""Workers are lost and come back: streams go on where they were, and nobody is blamed wrongly."""

import random
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from support.fake_clock import FakeClock
from support.fake_model import SPEC, Ascii, continue_text, greedy
from support.fake_replica import make_workers
from support.fragile_replica import FragileReplica

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.executor import LocalExecutor
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.errors import Cause, EngineDeadError, NotRecoverableError
from saqqara.cluster.recovery.attempts import RecoveryLimits
from saqqara.cluster.recovery.deadline import FLOOR_SECONDS, MOST_SECONDS
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.configs.schema import EngineConfig

NAMES = ("one", "two", "three")
Output = RequestOutput | ScoreOutput


class Bed:
    """An engine over a replica that breaks, in time that only passes when somebody waits."""

    def __init__(
        self,
        losses: Mapping[int, Cause] = MappingProxyType({}),
        poison: Collection[str] = (),
        *,
        num_pages: int = 1000,
        stages: tuple[int, ...] = (4,),
        lookahead: int = 1,
        failing_starts: int = 0,
        stale: bool = False,
        limits: RecoveryLimits | None = None,
        **settings: Any,
    ) -> None:
        self.clock = FakeClock()
        self.replica = FragileReplica(
            make_workers(num_pages, stages=stages),
            losses,
            [tokens(name) for name in poison],
            failing_starts,
            stale=stale,
        )
        self.clock.on_wait = self.replica.tick
        config = EngineConfig.model_validate(
            {"model": "fake", "max_num_seqs": 8, "executor": "ray", "check_integrity": True}
            | settings
        )
        self.engine = Engine(
            config,
            self.replica,
            Tokenizer(Ascii()),
            SPEC,
            lookahead=lookahead,
            limits=limits,
            clock=self.clock,
        )
        self.outputs: list[Output] = []

    def add(self, *names: str, num_tokens: int = 12, **settings: Any) -> None:
        for name in names:
            params = greedy(max_tokens=num_tokens, **settings)
            self.engine.add(Request(name, name, params, stream=True))

    def run(self, most_steps: int = 20_000) -> None:
        for _ in range(most_steps):
            if not self.engine.has_unfinished():
                break
            self.outputs += self.engine.step()
        assert not self.engine.has_unfinished()
        assert self.engine.report().pages_leaked == 0

    def seen(self, name: str) -> list[RequestOutput]:
        found = [o for o in self.outputs if o.request_id == name]
        assert all(isinstance(output, RequestOutput) for output in found)
        return found  # type: ignore[return-value]

    def check(self, name: str, num_tokens: int = 12) -> None:
        """Each output of a stream had one token more, and they are what the model says."""
        text, ids = continue_text(name, num_tokens)
        outputs = [output.outputs[0] for output in self.seen(name)]
        assert [o.token_ids for o in outputs] == [tuple(ids[: i + 1]) for i in range(num_tokens)]
        assert outputs[-1].text == text
        assert outputs[-1].finish_reason == "length"


def tokens(name: str) -> tuple[int, ...]:
    """The prompt of a request, as it comes to the workers."""
    return (1, *map(ord, name))


@pytest.mark.parametrize("cause", ["died", "failed", "hung", "unreachable"])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("stages", "lookahead"), [((4,), 1), ((2, 2), 1), ((2, 2), 2)])
@pytest.mark.parametrize("step", [0, 1, 3, 7])
def test_streams_go_on_without_a_lost_or_repeated_token(
    step: int, stages: tuple[int, ...], lookahead: int, stale: bool, cause: Cause
) -> None:
    bed = Bed({step: cause}, stages=stages, lookahead=lookahead, stale=stale)
    bed.add(*NAMES)
    bed.run()
    for name in NAMES:
        bed.check(name)
    assert bed.replica.num_starts == 1
    report = bed.engine.report()
    assert report.recoveries == {cause: 1}
    assert report.down_seconds > 0


def test_scores_go_on_too() -> None:
    alone = Bed()
    broken = Bed({2: "died", 4: "died"}, max_extend_tokens=2)
    for bed in (alone, broken):
        bed.engine.add(Request("s", "abcdef", score_continuation="ghijkl"))
        bed.run()
    [expected], [got] = alone.outputs, broken.outputs
    assert isinstance(expected, ScoreOutput)
    assert isinstance(got, ScoreOutput)
    assert got == replace(expected, metrics=got.metrics)
    assert broken.replica.num_starts == 2


def test_a_worker_that_is_lost_while_nothing_runs_is_replaced_before_it_is_needed() -> None:
    bed = Bed()
    bed.add("one")
    bed.run()
    bed.replica.lose("died")
    assert not bed.engine.is_ready
    bed.run()
    assert bed.replica.num_starts == 1
    bed.add("two")
    bed.run()
    bed.check("two")


def test_meanwhile_requests_are_taken_and_aborted_and_metrics_say_so() -> None:
    bed = Bed({2: "died"}, failing_starts=2)
    bed.add("one", "two")
    while bed.engine.is_ready:
        bed.outputs += bed.engine.step()
    assert 'saqqara:ready{model_name="fake"} 0.0' in bed.engine.metrics.render()
    bed.add("three")
    bed.engine.abort("two")
    bed.outputs += bed.engine.step()
    assert not bed.engine.is_ready
    assert bed.seen("two")[-1].outputs[0].finish_reason == "abort"
    bed.run()
    bed.check("one")
    bed.check("three")
    text = bed.engine.metrics.render()
    for line in [
        'saqqara:ready{model_name="fake"} 1.0',
        'saqqara:recoveries_total{cause="died",model_name="fake"} 1.0',
        'saqqara:recoveries_total{cause="hung",model_name="fake"} 0.0',
    ]:
        assert line in text
    [down] = re.findall(r"^saqqara:down_seconds_total{[^}]*} (\S+)", text, re.M)
    assert 3.0 <= float(down) < 3.5, "two starts failed: waits of 1 and 2 s"


def test_the_new_workers_may_have_less_room() -> None:
    bed = Bed({6: "unreachable"}, num_pages=400)
    bed.add(*NAMES)
    bed.replica._infos = [*make_workers(70)]
    bed.run()
    for name in NAMES:
        bed.check(name)


def test_a_hang_is_known_within_seconds_once_steps_are_measured() -> None:
    bed = Bed({20: "hung"})
    bed.add(*NAMES, num_tokens=40)
    while bed.replica.num_steps <= 20:
        bed.outputs += bed.engine.step()
        before = bed.clock.time
    while bed.engine.is_ready:
        bed.outputs += bed.engine.step()
    assert bed.engine.report().recoveries == {}
    bed.run()
    for name in NAMES:
        bed.check(name, 40)
    assert bed.engine.report().recoveries == {"hung": 1}
    assert bed.clock.time - before < FLOOR_SECONDS + 60 * 0.25


@pytest.mark.parametrize(("losses", "at_most"), [({20: "hung"}, 2 * FLOOR_SECONDS)])
def test_the_time_to_notice(losses: Mapping[int, Cause], at_most: float) -> None:
    bed = Bed(losses)
    bed.add("one", num_tokens=40)
    times = [bed.clock.time]
    while bed.engine.is_ready:
        bed.outputs += bed.engine.step()
        times.append(bed.clock.time)
    assert FLOOR_SECONDS <= times[-1] - times[-2] <= at_most


def test_a_first_step_may_take_its_time() -> None:
    bed = Bed({0: "hung"})
    bed.add("one")
    started = bed.clock.time
    while bed.engine.is_ready:
        bed.engine.step()
    assert bed.clock.time - started >= MOST_SECONDS


def test_random_losses_make_nobody_guilty() -> None:
    """At most four in a row, then some peace: nobody is alone at three losses without a token."""
    rng = random.Random(7)
    causes: list[Cause] = ["died", "failed", "hung", "unreachable"]
    losses: dict[int, Cause] = {}
    step = 0
    while step < 1500:
        step += rng.randint(40, 60)
        for _ in range(rng.randint(1, 4)):
            losses[step] = rng.choice(causes)
            step += 1
    bed = Bed(losses, stages=(2, 2), lookahead=2)
    names = [f"name {i}" for i in range(20)]
    bed.add(*names, num_tokens=150)
    bed.run()
    for name in names:
        bed.check(name, 150)
    assert bed.replica.num_starts >= 30


@pytest.mark.parametrize(("stages", "lookahead"), [((4,), 1), ((2, 2), 1), ((2, 2), 2)])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_who_ends_workers_is_found_and_ended_alone(
    num_choices: int, stages: tuple[int, ...], lookahead: int
) -> None:
    bed = Bed(poison=["two"], stages=stages, lookahead=lookahead)
    bed.add("one")
    bed.add("two", n=num_choices)
    bed.add("three")
    bed.run()
    bed.check("one")
    bed.check("three")
    [output] = [o for o in bed.seen("two") if o.finished]
    assert [choice.finish_reason for choice in output.outputs] == ["error"] * num_choices
    assert output.error is not None
    assert "request two has ended the workers 3 times while it ran alone" in output.error
    assert bed.replica.runs[-1] != {tokens("two")}
    alone = [run for run in bed.replica.runs if run == {tokens("two")}]
    assert len(alone) == 3
    assert bed.replica.num_starts <= 6


def test_several_of_them_cost_themselves_only() -> None:
    names = [f"name {i}" for i in range(12)]
    bad = names[3:10:3]
    bed = Bed(poison=bad)
    bed.add(*names)
    bed.run()
    for name in names:
        if name in bad:
            assert bed.seen(name)[-1].outputs[0].finish_reason == "error"
        else:
            bed.check(name)


@pytest.mark.parametrize("waiting", [[], ["three"], ["three", "four", "five"]])
def test_they_are_found_though_only_they_run(waiting: list[str]) -> None:
    """Those that wait for a slot may not run beside suspects, so one of them shows the proof."""
    bed = Bed(poison=["one", "two"], max_num_seqs=2)
    bed.add("one", "two", *waiting)
    if not waiting:
        with pytest.raises(EngineDeadError):
            bed.run()
        return
    bed.run()
    for name in ("one", "two"):
        assert bed.seen(name)[-1].outputs[0].finish_reason == "error"
    for name in waiting:
        bed.check(name)


def test_the_control_may_be_aborted() -> None:
    bed = Bed(poison=["one", "two"], max_num_seqs=2)
    bed.add("one", "two", "three")
    while {tokens("three")} not in bed.replica.runs:
        bed.outputs += bed.engine.step()
    bed.engine.abort(["three"])
    bed.add("four")
    bed.run()
    bed.check("four")


def test_the_suspects_run_alone_each_until_it_has_a_token() -> None:
    bed = Bed({3: "died", 4: "died"})
    bed.add(*NAMES)
    bed.run()
    for name in NAMES:
        bed.check(name)
    after = bed.replica.runs[5:]
    assert [len(run) for run in after[:6]] == [1] * 6, "a prefill and a replay each"
    assert [after[i] for i in (0, 2, 4)] == [{tokens(name)} for name in NAMES]
    assert set(NAMES) == {o.request_id for o in bed.outputs if o.finished}
    assert any(len(run) == 3 for run in after[6:]), "then they run together again"


def test_hopeless_is_a_clear_end() -> None:
    limits = RecoveryLimits(max_attempts=4)
    bed = Bed(dict.fromkeys(range(100), "died"), limits=limits)
    bed.add(*NAMES)
    with pytest.raises(
        EngineDeadError, match=r"given up after 4 starts without a new token.*rank 1"
    ):
        bed.run()
    with pytest.raises(RuntimeError, match="needs a restart"):
        bed.engine.step()


def test_the_worker_of_this_process_cannot_be_started_again() -> None:
    executor = LocalExecutor.__new__(LocalExecutor)  # without a model
    assert executor.failure is None
    with pytest.raises(NotRecoverableError, match="part of this process"):
        executor.recover().result(timeout=0)

"""A request that has run out of time ends with what it has, and costs nobody else anything."""

import pytest
from support.fake_clock import FakeClock
from support.fake_model import SPEC, Ascii, continue_text, greedy
from support.fake_replica import make_workers
from support.fragile_replica import FragileReplica

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.recovery.attempts import RecoveryLimits
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.configs.schema import EngineConfig


class Bed:
    """An engine with one slot, in time that the test changes."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.replica = FragileReplica(make_workers(1000))
        self.clock.on_wait = self.replica.tick
        config = EngineConfig(model="fake", executor="ray", max_num_seqs=1, check_integrity=True)
        limits = RecoveryLimits(max_attempts=10**9)
        self.engine = Engine(
            config, self.replica, Tokenizer(Ascii()), SPEC, limits=limits, clock=self.clock
        )
        self.outputs: dict[str, RequestOutput | ScoreOutput] = {}

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.outputs |= {o.request_id: o for o in self.engine.step()}

    def finish(self) -> None:
        while self.engine.has_unfinished():
            self.step()
        assert self.engine.report().pages_leaked == 0


def ended(bed: Bed, name: str) -> RequestOutput:
    output = bed.outputs[name]
    assert isinstance(output, RequestOutput)
    assert output.finished
    return output


def test_a_running_and_a_waiting_request_end_in_the_step_after_their_time() -> None:
    bed = Bed()
    bed.engine.add(Request("runs", "a", greedy(max_tokens=150), timeout_seconds=60.0, stream=True))
    bed.engine.add(Request("waits", "b", greedy(max_tokens=5), timeout_seconds=60.0))
    bed.engine.add(Request("other", "c", greedy(max_tokens=5)))
    bed.step(4)
    assert bed.engine.scheduler.num_running == 1
    bed.clock.time += 60.0
    bed.step()
    for name in ("runs", "waits"):
        output = ended(bed, name)
        assert output.error_code == "deadline_exceeded"
        assert output.outputs[0].finish_reason == "error"
    got = ended(bed, "runs").outputs[0].token_ids
    assert got == tuple(continue_text("a", len(got))[1])
    assert len(got) > 0
    bed.finish()
    assert ended(bed, "other").outputs[0].token_ids == tuple(continue_text("c", 5)[1])


def test_time_goes_on_while_workers_are_started_again() -> None:
    bed = Bed()
    bed.replica.failing_starts = 10**9
    bed.engine.add(Request("r", "a", greedy(max_tokens=150), timeout_seconds=60.0))
    bed.step(3)
    bed.replica.lose("died")
    bed.step(5)
    assert not bed.engine.is_ready
    bed.clock.time += 60.0
    bed.step()
    assert ended(bed, "r").error_code == "deadline_exceeded"


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), True, "1", 1e9])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    bed = Bed()
    with pytest.raises(ValueError, match="timeout_seconds: must be a number above 0"):
        bed.engine.add(Request("r", "a", timeout_seconds=seconds))
    assert not bed.engine.has_unfinished()

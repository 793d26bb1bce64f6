"""A controller is lost: the next one answers what had not ended."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from support.fake_client import FakeClient, answer_tokens
from support.fake_clock import FakeClock

from saqqara.cluster.engine.client import Rejection
from saqqara.cluster.engine.report import EngineReport
from saqqara.cluster.errors import ControllerLostError, EngineDeadError
from saqqara.cluster.failover import FailoverClient
from saqqara.cluster.recovery.attempts import RecoveryLimits
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.cluster.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


class MortalClient(FakeClient):
    """Its controller is lost at its `dies_at`th call."""

    def __init__(self, dies_at: int | None = None, *, refuses: bool = False) -> None:
        super().__init__(per_poll=2)
        self.dies_at = dies_at
        self.refuses = refuses
        self.num_calls = 0
        self.is_shut_down = False

    def submit(self, requests: Sequence[Request]) -> list[Rejection]:
        self._count()
        if self.refuses:
            return [Rejection(requests[0].request_id, "no room")]
        return super().submit(requests)

    def poll(self, timeout_seconds: float = 0.0) -> list[RequestOutput | ScoreOutput]:
        self._count()
        return super().poll(timeout_seconds)

    def report(self) -> EngineReport:
        self._count()
        return super().report().model_copy(update={"recoveries": {"died": 1}, "down_seconds": 2.0})

    def shutdown(self) -> None:
        self.is_shut_down = True

    def _count(self) -> None:
        self.num_calls += 1
        if self.dies_at is not None and self.num_calls >= self.dies_at:
            raise ControllerLostError("the controller has died")


class Bed:
    """Clients that follow one another; an error in the list is what a start ends with."""

    def __init__(self, *clients: MortalClient | Exception, max_attempts: int = 8) -> None:
        self.clients = list(clients)
        self.started: list[MortalClient] = []
        self.clock = FakeClock(longest_sleep=30.0)
        limits = RecoveryLimits(max_attempts=max_attempts)
        self.client = FailoverClient(self.start, limits, self.clock)

    def start(self) -> MortalClient:
        assert all(client.is_shut_down for client in self.started), "what is left of the last one"
        client = self.clients.pop(0)
        if isinstance(client, Exception):
            raise client
        self.started.append(client)
        return client

    def run(self, requests: Sequence[Request], most_polls: int = 100) -> dict[str, RequestOutput]:
        assert self.client.submit(requests) == []
        outputs: dict[str, RequestOutput] = {}
        for _ in range(most_polls):
            for output in self.client.poll():
                assert isinstance(output, RequestOutput)
                assert output.request_id not in outputs, "answered twice"
                outputs[output.request_id] = output
            if len(outputs) == len(requests):
                break
        return outputs


def ask(num_requests: int) -> list[Request]:
    return [Request(f"r{i}", f"prompt {i}", GREEDY) for i in range(num_requests)]


@pytest.mark.parametrize("dies_at", range(1, 6))
def test_each_request_is_answered_once_whenever_controllers_are_lost(dies_at: int) -> None:
    bed = Bed(MortalClient(dies_at), MortalClient(2), MortalClient(3), MortalClient())
    requests = ask(7)
    outputs = bed.run(requests)
    for request in requests:
        assert outputs[request.request_id].outputs[0].token_ids == answer_tokens(request)
    assert len(bed.started) > 1
    bed.client.shutdown()
    assert all(client.is_shut_down for client in bed.started)


def test_a_start_that_fails_is_tried_again_after_a_while() -> None:
    failures = [RuntimeError("no node has room"), EngineDeadError("rank 1 did not start")]
    bed = Bed(MortalClient(3), *failures, MortalClient())
    assert len(bed.run(ask(5))) == 5
    assert bed.clock.now() >= 1.0 + 2.0


def test_reports_count_the_controllers_and_what_was_reported_before() -> None:
    bed = Bed(MortalClient(3), RuntimeError("no room"), MortalClient())
    bed.client.submit(ask(1))
    before = bed.client.report()
    assert before.recoveries == {"died": 1}
    bed.client.poll()
    after = bed.client.report()
    assert after.recoveries == {"died": 2, "controller": 1}
    assert after.down_seconds == pytest.approx(2.0 + 2.0 + 1.0)
    bed.client.reset_stats()
    assert bed.client.report().recoveries == {"died": 1}


def test_it_ends_where_no_controller_lives_long_enough_for_an_answer() -> None:
    bed = Bed(*(MortalClient(2) for _ in range(5)), max_attempts=4)
    bed.client.submit(ask(1))
    with pytest.raises(EngineDeadError, match=r"given up after 4 starts.*has died"):
        bed.client.poll()
    assert all(client.is_shut_down for client in bed.started)


def test_an_engine_that_is_lost_for_good_is_no_reason_for_another() -> None:
    client = MortalClient()
    client.die_after = 0
    bed = Bed(client)
    bed.client.submit(ask(1))
    with pytest.raises(EngineDeadError) as error:
        bed.client.poll()
    assert not isinstance(error.value, ControllerLostError)


def test_a_request_that_the_next_one_refuses_is_named() -> None:
    bed = Bed(MortalClient(2), MortalClient(refuses=True))
    bed.client.submit(ask(2))
    with pytest.raises(EngineDeadError, match="refuses request r0: no room"):
        bed.client.poll()
    assert bed.started[1].is_shut_down


def test_what_streams_cannot_be_taken_over() -> None:
    bed = Bed(MortalClient())
    with pytest.raises(AssertionError, match="cannot be taken back"):
        bed.client.submit([Request("s", "prompt", GREEDY, stream=True)])


class BusyClient(MortalClient):
    """Something else happens while it takes in requests."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self.meanwhile = meanwhile

    def submit(self, requests: Sequence[Request]) -> list[Rejection]:
        rejections = super().submit(requests)
        self.meanwhile()
        return rejections


def test_what_is_submitted_while_a_controller_is_lost_goes_to_the_next() -> None:
    def lose() -> None:
        first.dies_at = 0
        bed.client.poll()  # as another thread does

    first = BusyClient(lose)
    bed = Bed(first, MortalClient())
    assert set(bed.run(ask(3))) == {"r0", "r1", "r2"}
    assert len(bed.started) == 2


def test_what_is_answered_before_submit_returns_is_not_asked_again() -> None:
    outputs: list[RequestOutput | ScoreOutput] = []
    first = BusyClient(lambda: outputs.extend(bed.client.poll()))
    second = MortalClient()
    bed = Bed(first, second)
    assert bed.client.submit(ask(2)) == []
    assert {output.request_id for output in outputs} == {"r0", "r1"}
    first.dies_at = 0
    assert bed.client.poll() == []
    assert second.submitted == []


def test_a_second_request_of_an_id_leaves_the_first_under_way() -> None:
    class Strict(MortalClient):
        def submit(self, requests: Sequence[Request]) -> list[Rejection]:
            known = {request.request_id for request in self.submitted}
            again = [r for r in requests if r.request_id in known]
            super().submit([r for r in requests if r not in again])
            return [Rejection(r.request_id, "in use") for r in again]

    first = Strict()
    bed = Bed(first, MortalClient())
    assert bed.client.submit(ask(1)) == []
    assert [r.request_id for r in bed.client.submit(ask(1))] == ["r0"]
    first.dies_at = 0
    assert [output.request_id for output in bed.client.poll()] == ["r0"]


def test_a_request_has_with_the_next_controller_what_time_it_has_left() -> None:
    bed = Bed(MortalClient(2), MortalClient())
    requests = [replace(r, timeout_seconds=100.0) for r in ask(4)]
    assert bed.client.submit(requests) == []
    bed.clock.time += 30.0
    answered = {o.request_id for o in bed.client.poll()}
    while len(answered) < 4:
        answered |= {o.request_id for o in bed.client.poll()}
    second = bed.started[1]
    assert second.submitted
    for request in second.submitted:
        assert request.timeout_seconds is not None
        assert 0 < request.timeout_seconds <= 70.0

"""The thread of steps begins the next plan while the device is at the one before."""

import threading

import pytest

from saqqara.cluster.engine.executor import StepThread
from saqqara.workers.plan import StepPlan, StepResult


class Step:
    """A step that the device ends when it is told to."""

    def __init__(self, plan: StepPlan, told: list[str]) -> None:
        self.plan = plan
        self.is_over = threading.Event()
        self._told = told

    @property
    def is_ready(self) -> bool:
        return self.is_over.is_set()

    def result(self) -> StepResult:
        assert self.is_over.wait(30)
        self._told.append(f"read {self.plan.step}")
        return StepResult(self.plan.step, rank=0)


class Device:
    """Begins every plan but those of `broken`."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.told: list[str] = []
        self.begun: dict[int, Step] = {}
        self.changed = threading.Condition()
        self._broken = broken

    def begin(self, plan: StepPlan) -> Step:
        with self.changed:
            self.told.append(f"begin {plan.step}")
            if plan.step in self._broken:
                raise ArithmeticError("broken")
            self.begun[plan.step] = Step(plan, self.told)
            self.changed.notify_all()
            return self.begun[plan.step]

    def await_begun(self, step: int) -> Step:
        with self.changed:
            assert self.changed.wait_for(lambda: step in self.begun, 30)
            return self.begun[step]


def test_a_plan_is_begun_before_the_last_result_is_read() -> None:
    device = Device()
    thread = StepThread(device)
    first, second = thread.execute(StepPlan(1)), thread.execute(StepPlan(2))
    device.await_begun(2)
    assert not first.done()
    device.begun[1].is_over.set()
    assert [r.step for r in first.result(30)] == [1]
    third = thread.execute(StepPlan(3))  # while the device is at the second
    device.await_begun(3)
    assert device.told == ["begin 1", "begin 2", "read 1", "begin 3"]
    for step in (2, 3):
        device.begun[step].is_over.set()
    thread.end()
    assert [f.result(30)[0].step for f in (second, third)] == [2, 3]
    assert device.told[4:] == ["read 2", "read 3"]


def test_a_step_that_cannot_be_begun_fails_alone() -> None:
    device = Device(broken=(2,))
    thread = StepThread(device)
    futures = [thread.execute(StepPlan(step)) for step in (1, 2, 3)]
    device.await_begun(3)
    for step in (1, 3):
        device.begun[step].is_over.set()
    thread.end()
    with pytest.raises(ArithmeticError, match="broken"):
        futures[1].result(30)
    assert [futures[n].result(30)[0].step for n in (0, 2)] == [1, 3]

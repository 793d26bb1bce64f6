"""Seconds by phase: the host's own time, or what a device says that it worked."""

from dataclasses import dataclass

import pytest

from saqqara.workers.clock import StepClock


@dataclass
class Device:
    """Enqueued work that takes what a test says; `done` is up to where it is finished."""

    enqueued: float = 0.0
    done: float = 0.0

    def event(self) -> "Moment":
        return Moment(self)


@dataclass
class Moment:
    """An event of the device, in seconds."""

    device: Device
    at: float = -1.0

    def record(self) -> None:
        self.at = self.device.enqueued

    def query(self) -> bool:
        return self.device.done >= self.at

    def elapsed_time(self, end_event: "Moment", /) -> float:
        return 1e3 * (end_event.at - self.at)


def test_a_phase_takes_what_the_device_works_and_not_what_enqueueing_takes() -> None:
    device = Device()
    clock = StepClock(device.event)  # type: ignore[arg-type]
    clock.begin_step()
    with clock.phase("total"):
        with clock.phase("decode"):
            device.enqueued += 20.0
        with clock.phase("head"):
            device.enqueued += 3.0
        with clock.phase("decode"):
            device.enqueued += 1.0
    device.done = 23.0
    clock.close_step()
    seconds = clock.seconds
    assert {name: seconds[name] for name in ("decode", "head")} == {"decode": 20.0, "head": 3.0}
    assert seconds["total"] < 1.0, "the host's own"

    clock.begin_step()
    clock.close_step()
    assert clock.seconds == {}, "the device is still at it"
    device.done = 24.0
    clock.begin_step()
    clock.close_step()
    assert clock.seconds == {"decode": 1.0}, "counted in a later step"
    assert seconds["decode"] == pytest.approx(20.0), "not in one that was reported"


def test_the_host_times_what_it_does_itself() -> None:
    clock = StepClock()
    clock.begin_step()
    with clock.phase("decode"):
        pass
    clock.close_step()
    assert 0 <= clock.seconds["decode"] < 1.0

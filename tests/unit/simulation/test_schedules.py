"""Random faults under the real engine: no request is lost, ended twice or left, no page is missing.

A slice of what `make fault-schedules` runs.
"""

from collections.abc import Callable

import pytest
from support.fault_schedules import Schedule, Tally, run_seeds
from support.planted_bugs import QUICKLY_FOUND

from saqqara.cluster.recovery.flights import Flights

SLICE = 30


@pytest.mark.parametrize("first", [0, SLICE])
def test_no_schedule_loses_a_request_a_token_or_a_page(first: int) -> None:
    tally = run_seeds(range(first, first + SLICE))
    assert tally.schedules == SLICE
    assert set(tally.recoveries) == {"died", "failed", "hung", "unreachable"}
    assert tally.recoveries.total() > SLICE
    assert tally.compared > 0.7 * tally.steps > 0  # where it is known what ranks hold
    ends = tally.finished
    assert ends["length"] + ends["score stop"] > 0.9 * ends.total()


def test_a_schedule_is_its_seed_and_can_be_run_again_step_by_step() -> None:
    def told(seed: int) -> tuple[list[str], Tally]:
        lines: list[str] = []
        return lines, Schedule(seed, tell=lines.append).run()

    lines, tally = told(3)
    assert len(lines) == tally.calls
    assert any("waiting" in line for line in lines)
    assert told(3) == (lines, tally)
    assert told(4) != (lines, tally)


def test_the_error_of_a_schedule_names_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flights, "drop", lambda self: None)
    with pytest.raises(AssertionError) as raised:
        run_seeds(range(20))
    [note] = raised.value.__notes__[-1:]
    seed = int(note.split()[1].rstrip(","))
    with pytest.raises(AssertionError, match=r"absorbed before|left for ever"):
        Schedule(seed).run()


@pytest.mark.parametrize("plant", QUICKLY_FOUND, ids=lambda plant: plant.__name__)
def test_planted_bugs_are_found_soon(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(Exception, match=r"."):
        run_seeds(range(20))

"""A large slice of the random schedules of faults, and every planted bug (`make prove`)."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from support.fault_schedules import run_seeds
from support.planted_bugs import PLANTS
from support.run_fault_schedules import run_in_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_SCHEDULES = 1000
FIRST = 1_000_000  # other ones than `make fault-schedules` runs


def test_many_schedules_lose_nothing(capsys: Any) -> None:
    start = time.perf_counter()
    tally = run_in_processes(FIRST, NUM_SCHEDULES, processes=2)
    with capsys.disabled():
        print(f"\n{tally} in {time.perf_counter() - start:.0f} s")
    assert tally.schedules == NUM_SCHEDULES
    assert tally.compared > 0.7 * tally.steps


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_every_planted_bug_is_found_within_1000_schedules(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plant(monkeypatch)
    with pytest.raises(Exception, match=r".") as raised:
        run_seeds(range(1000))
    with capsys.disabled():
        print(f"\n{plant.__name__}: {raised.value.__notes__[-1]}: {raised.value}"[:160])

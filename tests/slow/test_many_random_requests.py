"""20,000 random requests on a tiny engine without an engine death (`make prove`)."""

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.random_runs import UNFORESEEN, Door, Tally, run_door

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_OF_EACH_DOOR = 10_000
SEEDS: Mapping[Door, int] = {"python": 1, "http": 2}


def test_20000_requests(tmp_path: Path, capsys: Any) -> None:
    """Each door in a process of its own; a dead engine or a 5xx is an error of its run."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(SEEDS), mp_context=context) as pool:
        parts = {
            door: pool.submit(run_door, tmp_path / door, door, seed, NUM_OF_EACH_DOOR)
            for door, seed in SEEDS.items()
        }
        tallies = {door: part.result() for door, part in parts.items()}
    with capsys.disabled():
        for door, tally in tallies.items():
            print(f"\n{door}: {_text(tally)}")
    for door, tally in tallies.items():
        total = tally.counts.total()
        assert total >= NUM_OF_EACH_DOOR
        assert tally.num_finished >= total / 2, f"{door}: {tally.counts}"
        assert not tally.untried, f"through {door}"
        unexpected = [error for error in tally.errors if UNFORESEEN not in error]
        assert not unexpected, f"{door}: requests that were taken ended with errors"


def _text(tally: Tally) -> str:
    times = sorted(tally.tried.values())
    return (
        f"{tally.counts.total()} requests, {tally.num_finished} valid and finished: "
        f"{dict(tally.counts)}; {len(times)} edges tried, each at least {times[0]} times; "
        f"in bounds, but refused by other checks: {tally.never_taken}; "
        f"errors of requests that were taken: {dict(tally.errors)}"
    )

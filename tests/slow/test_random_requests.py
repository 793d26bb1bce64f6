"""20,000 random requests on a tiny engine without an engine death (`make prove`)."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.random_requests import SAMPLING, requests
from support.random_runs import RandomRuns

from saqqara.compression.bounds import BOUNDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_REQUESTS, BATCH = 20_000, 16
NOT_DRAWN_AS_NUMBERS = {"share", "propagate.layer"}


def test_20000_requests(tmp_path: Path, capsys: Any) -> None:
    runs = RandomRuns(tmp_path)
    num_batches = NUM_REQUESTS // BATCH

    @settings(
        max_examples=num_batches,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(batch=st.lists(requests(), min_size=BATCH, max_size=BATCH), over_http=st.booleans())
    def run(batch: Any, over_http: bool) -> None:
        (runs.http if over_http else runs.python)(batch)

    run()
    with capsys.disabled():
        print(f"\n{runs.counts.total()} requests: {dict(runs.counts)}")
        print(f"errors of requests that were taken: {dict(runs.errors)}")
        print(f"edges tried: {dict(sorted(runs.tried.items()))}")
    assert runs.counts.total() >= NUM_REQUESTS
    assert runs.num_finished >= runs.counts.total() / 2
    for name in {*SAMPLING, *BOUNDS, "priority"} - NOT_DRAWN_AS_NUMBERS:
        for side in ("least", "most", "below", "above"):
            assert runs.tried[f"{name} {side}"], f"{name} was never tried {side}"

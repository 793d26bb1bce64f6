"""Workers store, layer by layer, what the authors' release of PyramidInfer stores."""

from pathlib import Path
from typing import Any

import pytest
from support.pyramidinfer_counts import RELEASE, stored_by_a_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("run", RELEASE, ids=lambda r: f"{r['prompt_tokens']}+{r['fed_tokens']}")
def test_the_counts_of_the_release(run: dict[str, Any], tmp_path: Path) -> None:
    stored = stored_by_a_worker(tmp_path, run["prompt_tokens"], run["fed_tokens"])
    assert {len(set(layer)) for layer in stored} == {1}
    assert [layer[0] for layer in stored] == run["stored"]

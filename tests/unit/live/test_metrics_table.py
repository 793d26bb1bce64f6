"""The tables of docs/metrics.md are the metrics that there are, no more and no fewer."""

import re
from pathlib import Path

import pytest

from saqqara.cluster.live.families import METRICS
from saqqara.cluster.live.snapshot import LiveStats

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if re.match(r"\| `(vllm|saqqara):", line)
]


def test_names_kinds_and_labels_are_those_of_the_code() -> None:
    told = [(cells[0], cells[1], cells[3]) for cells in ROWS]
    assert told == [
        (
            f"`{spec.name}{'_total' if spec.kind == 'counter' else ''}`",
            spec.kind,
            ", ".join(f"`{label}`" for label in spec.labels),
        )
        for prefix in ("vllm:", "saqqara:")
        for spec in METRICS
        if spec.name.startswith(prefix)
    ]


def test_every_cell_says_something() -> None:
    for name, kind, unit, _labels, meaning, *against in ROWS:
        assert all((unit, meaning, *against)), name
        assert len(against) == name.startswith("`vllm:"), name
        assert ("seconds" in name and kind != "gauge") == (unit == "seconds"), name


@pytest.mark.parametrize("field", LiveStats.model_fields)
def test_every_field_of_stats_is_told(field: str) -> None:
    assert re.search(rf"^\| [^|]*`{field}`", TEXT, re.M)

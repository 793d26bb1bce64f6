"""The committed dashboards are what `dashboards.py` makes, of metrics that the engine exports."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from saqqara.cluster.live.families import METRICS

FOLDER = Path(__file__).resolve().parents[3] / "deploy" / "grafana"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
EXPORTED = {spec.name + suffix for spec in METRICS for suffix in SUFFIXES[spec.kind]}
FILES = sorted(path.name for path in FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def dashboards() -> Any:
    return importlib.import_module("dashboards")


def test_the_committed_files_are_what_the_code_makes(dashboards: Any, tmp_path: Path) -> None:
    dashboards.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    for name in FILES:
        text = (FOLDER / name).read_text()
        assert (tmp_path / name).read_text() == text, (
            f"{name} is not what dashboards.py makes with this version of grafana-foundation-sdk; "
            "constraints.txt has the right one"
        )


@pytest.mark.parametrize("name", FILES)
def test_queries_are_of_exported_metrics_and_of_the_chosen_engines(name: str) -> None:
    board = json.loads((FOLDER / name).read_text())
    assert [v["name"] for v in board["templating"]["list"]] == [
        *("datasource", "job", "instance", "model")
    ]
    uids = set()
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            uids.add(target["datasource"]["uid"])
            selectors = re.findall(r"([a-z_]+:[a-z0-9_]+)(\{[^}]*\})?", target["expr"])
            assert selectors
            for metric, matchers in selectors:
                assert metric in EXPORTED, f"{panel['title']}: {metric}"
                for variable in ("$job", "$instance", "$model"):
                    assert f'=~"{variable}"' in matchers, f"{panel['title']}: {metric}"
    assert uids == {"${datasource}"}


def test_panels_do_not_overlap() -> None:
    for name in FILES:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads((FOLDER / name).read_text())["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, f"{name}: {panel['title']}"
            taken |= cells

"""`saqqara methods`: every method says what it keeps, needs and costs."""

import io
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from saqqara.cli import app
from saqqara.cluster.cli.methods import print_methods
from saqqara.compression.methods import MethodRow, method_table
from saqqara.compression.spelling import presets


def row(name: str) -> MethodRow:
    """The row of one method."""
    [found] = [row for row in method_table() if row.name == name]
    return found


def test_every_preset_is_in_the_list() -> None:
    result = CliRunner().invoke(app, ["methods", "--json"])
    assert result.exit_code == 0
    listed = json.loads(result.output)
    assert set(listed) == set(presets())
    assert all(all(text != "" for text in fields.values()) for fields in listed.values())


def test_rows_follow_from_presets_scores_and_shapes() -> None:
    assert row("full") == MethodRow("full", "everything", "nothing", "nothing", False)
    assert row("knorm").costs == "next to nothing"
    assert row("h2o").costs == "attention of all queries once more"
    assert row("tova").costs == "attention of the last query once more"
    assert row("snapkv").costs == "attention of the last 32 queries once more"
    assert "fewer in higher layers" in row("pyramidkv").keeps
    assert "mean of 15 neighbours" in row("recommended-adaptive").keeps
    assert row("recommended-adaptive").needs == "a budget"
    assert row("headkv").needs.endswith("a profile of the model (saqqara eval calibrate)")
    assert row("recommended").needs.endswith("which it finds; else it is recommended-adaptive")
    assert row("fastkv").costs.endswith(
        "saves prefill: 60% of the tokens x layers are computed (4096 tokens, 32 layers)"
    )
    assert (row("pyramidinfer").needs, row("pyramidinfer").compacts) == ("nothing", True)


@pytest.mark.parametrize("width", [40, 70, 90, 140])
def test_the_list_keeps_its_names_at_any_width(width: int) -> None:
    text = io.StringIO()
    print_methods(method_table(), file=text, width=width)
    for name in presets():
        assert name in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= width


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As with `saqqara methods | head -1`."""
    command = [sys.executable, "-m", "saqqara.cli", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""

"""Tables can be read on a terminal of any width and in a file: no column goes, no number is cut."""

import fcntl
import io
import os
import pty
import re
import struct
import termios

import pytest
from rich.table import Table
from support.fake_client import FakeClient

from saqqara.cluster.batch.summary import ROWS, BatchSummary, summary_table
from saqqara.cluster.cli.tables import print_table, terminal_width


@pytest.fixture(autouse=True)
def no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that run side by side are told how wide their terminal is; files have no width."""
    monkeypatch.delenv("COLUMNS", raising=False)


def printed(table: Table, width: int | None) -> str:
    """What a table looks like on a terminal of this width, or in a file."""
    file = io.StringIO()
    print_table(table, file=file, width=width)
    return file.getvalue()


def wide_table() -> Table:
    """As the benchmarks have them: a name, then numbers that may not wrap."""
    table = Table(title="speeds", caption="medians")
    table.add_column("engine")
    for at in range(8):
        table.add_column(f"speed{at}", justify="right", no_wrap=True)
    for row, name in enumerate(["saqqara:pyramidkv", "another"]):
        table.add_row(name, *(f"{row}{at}2,345.67" for at in range(8)))
    return table


@pytest.mark.parametrize("width", [20, 40, 60, 80, 1000, None])
def test_no_column_goes_and_no_number_is_cut(width: int | None) -> None:
    text = printed(wide_table(), width)
    for name in ["engine", "saqqara:pyramidkv", "another"]:
        assert name in text
    for at in range(8):
        assert re.search(rf"speed{at}\b", text)
        assert f"0{at}2,345.67" in text
        assert f"1{at}2,345.67" in text
    assert (text.count("speeds"), text.count("medians")) == (1, 1)
    if width is not None and width >= 40:
        assert max(map(len, text.splitlines())) <= width
    # Each part says whose numbers it has.
    assert text.count("another") == text.count("engine") == len(re.findall("^┏", text, re.M))


@pytest.mark.parametrize("width", [40, 60, 80, None])
def test_a_batch_summary_keeps_its_labels_and_numbers(width: int | None) -> None:
    summary = BatchSummary(
        input="in.jsonl",
        output="out.jsonl",
        model="model",
        retention="recommended-adaptive",
        budget="25%",
        rows=1000,
        answered=990,
        errors=10,
        resumed=0,
        wall_seconds=1234.5,
        start_seconds=1.0,
        integrity="ok, owners proved",
        report=FakeClient().report(),
    )
    text = printed(summary_table([summary, summary]), width)
    words = re.findall(r"[^\s│┃]+", text)
    for word in ["requests", "answered", "inter-token", "preemptions", "recommended-adaptive"]:
        assert word in words
    for number in ["990", "1000", "1234.5", "(25.0%)", "0.750"]:
        assert words.count(number) >= 2
    if width is None:
        assert len(re.findall("^┏", text, re.M)) == 1


def test_the_width_is_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal_width(io.StringIO()) is None
    leader, follower = pty.openpty()
    try:
        with os.fdopen(os.dup(follower), "w") as terminal:
            fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 57, 0, 0))
            assert terminal_width(terminal) == 57
    finally:
        os.close(leader)
        os.close(follower)
    monkeypatch.setenv("COLUMNS", "44")
    assert terminal_width(io.StringIO()) == 44


def test_a_batch_summary_says_what_was_lost() -> None:
    report = FakeClient().report()
    lost = report.model_copy(
        update={"recoveries": {"hung": 1, "died": 2}, "down_seconds": 12.34},
    )
    rows = dict(ROWS)
    summary = BatchSummary(
        input="in.jsonl",
        output="out.jsonl",
        model="fake",
        retention="full",
        budget=None,
        rows=1,
        answered=1,
        errors=0,
        resumed=0,
        wall_seconds=1.0,
        start_seconds=1.0,
        integrity="ok",
        report=report,
    )
    assert rows["lost workers"](summary) == "none"
    summary = summary.model_copy(update={"report": lost})
    assert rows["lost workers"](summary) == "2 died, 1 hung (12.3 s)"

"""What a benchmark's flag cannot mean ends with a message, not with a traceback."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("preemption", ["--race", ""], "--race: must be shares from 0 to less than 1 with commas"),
        ("preemption", ["--race", "0,1"], "--race: must be shares from 0 to less than 1"),
        ("preemption", ["--prompts", "512,,4"], "--prompts: must be whole numbers above 0"),
        ("preemption", ["--prompts", "0"], "--prompts: must be whole numbers above 0"),
        ("prediction", ["--runs", ""], "--runs: must be some of W1, W2,"),
        ("prediction", ["--runs", "W2,W99"], "not 'W2,W99'"),
    ],
)
def test_a_list_without_its_parts_is_refused(
    script: str,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_list_is_read_part_by_part() -> None:
    lists = importlib.import_module("harness.comma_lists")
    assert lists.comma_list(lists.fraction, "shares")("0,0.25") == [0, 0.25]
    assert lists.comma_list(lists.above_zero, "counts")("3") == [3]

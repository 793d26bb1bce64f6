"""Requests that are drawn or read: their times and lengths follow from what is asked."""

import json
from pathlib import Path

import numpy as np
import pytest

from saqqara.cluster.simulation.arrivals import Lengths, drawn_trace, read_trace

ALIKE = Lengths(100, 20, spread=0.0, most=200)


def test_a_poisson_process_has_its_rate_and_its_seed() -> None:
    trace = drawn_trace(20_000, 50.0, ALIKE, seed=3)
    gaps = np.diff(trace.seconds, prepend=0.0)
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)  # an exponential's mean is its deviation
    assert (drawn_trace(20_000, 50.0, ALIKE, seed=3).seconds == trace.seconds).all()
    assert (drawn_trace(20_000, 50.0, ALIKE, seed=4).seconds != trace.seconds).any()


def test_a_burst_comes_at_once_and_the_rate_stays() -> None:
    trace = drawn_trace(9_999, 50.0, ALIKE, seed=0, burst_size=10)
    times, sizes = np.unique(trace.seconds, return_counts=True)
    assert sizes.tolist() == [10] * 999 + [9]
    assert times[-1] == pytest.approx(9_999 / 50, rel=0.1)


def test_lengths_have_their_mean_and_spread_and_fit() -> None:
    alike = drawn_trace(10, 1.0, ALIKE, seed=0)
    assert (set(alike.prompt_tokens), set(alike.new_tokens)) == ({100}, {20})
    rng = np.random.default_rng(0)
    prompts, answers = Lengths(1000, 200, spread=0.5, most=100_000).draw(50_000, rng)
    assert prompts.mean() == pytest.approx(1000, rel=0.02)
    assert answers.mean() == pytest.approx(200, rel=0.02)
    assert prompts.std() == pytest.approx(500, rel=0.03)
    prompts, answers = Lengths(1000, 200, spread=2.0, most=1500).draw(10_000, rng)
    assert (prompts + answers).max() == 1500
    assert min(prompts.min(), answers.min()) >= 1


def test_a_file_is_read_in_the_order_of_its_times(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [(2.5, 10, 3), (0, 20, 1), (2.5, 30, 2)]
    names = ("seconds", "prompt_tokens", "new_tokens")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")
    trace = read_trace(file)
    assert trace.seconds.tolist() == [0.0, 2.5, 2.5]
    assert trace.prompt_tokens.tolist() == [20, 10, 30]
    assert trace.new_tokens.tolist() == [1, 3, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is no JSON"),
        ("[" * 100_000, "line 2 of .* is no JSON: recursion limit"),
        (
            '{"seconds": 1, "seconds": 2, "prompt_tokens": 1, "new_tokens": 1}',
            "line 2 .* 'seconds' is there twice",
        ),
        (
            '{"seconds": 1, "prompt_tokens": 1, "new_tokens": 1, "x": 1}',
            "line 2 of .* has 'x', which is none",
        ),
        (
            '{"seconds": 1%s, "prompt_tokens": 1, "new_tokens": 1}' % ("0" * 400),
            "line 2 .*seconds must be .* an integer of 1329 bits",
        ),
        (
            '{"seconds": 1, "prompt_tokens": 1%s, "new_tokens": 1}' % ("0" * 400),
            "line 2 .*prompt_tokens must be .* an integer of 1329 bits",
        ),
        (
            '{"seconds": 1%s, "prompt_tokens": 1, "new_tokens": 1}' % ("0" * 5000),
            "line 2 of .* is no JSON",
        ),
        ('{"seconds": 1, "prompt_tokens": 4}', "needs seconds, prompt_tokens, new_tokens"),
        ('{"seconds": -1, "prompt_tokens": 4, "new_tokens": 1}', "seconds must be a number"),
        ('{"seconds": NaN, "prompt_tokens": 4, "new_tokens": 1}', "seconds: JSON has finite"),
        ('{"seconds": 1, "prompt_tokens": 0, "new_tokens": 1}', "prompt_tokens must be a whole"),
        ('{"seconds": 1, "prompt_tokens": 4, "new_tokens": 1.5}', "new_tokens must be a whole"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        f'{{"seconds": 0, "prompt_tokens": 1, "new_tokens": 1}}\n{line}\n', encoding="utf-8"
    )
    with pytest.raises(ValueError, match=message):
        read_trace(file)


def test_a_byte_order_mark_is_taken(tmp_path: Path) -> None:
    line = b'{"seconds": 2, "prompt_tokens": 3, "new_tokens": 4}'
    (tmp_path / "trace.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    assert read_trace(tmp_path / "trace.jsonl").seconds.tolist() == [2.0]


def test_requests_that_are_too_long_are_named() -> None:
    trace = drawn_trace(3, 1.0, ALIKE, seed=0)
    trace.check_lengths(120)
    with pytest.raises(ValueError, match="request 1 has 100 tokens in and 20 out"):
        trace.check_lengths(119)

"""The `profile` shape: from a file with measured scores of heads to an exact budget of each row."""

import json
import math
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saqqara.compression.profiles.head_profile import HeadProfile
from saqqara.compression.retention import Retention

WINDOW, SINKS = 8, 4


def headkv(profile: Any, budget: int | str, **settings: Any) -> Retention:
    given_settings = {"method": "headkv", "profile": profile, "window": WINDOW, "sinks": SINKS}
    return Retention.parse({**given_settings, **settings}, budget)


def table(rows: list[list[float]]) -> dict[str, list[float]]:
    """A profile whose query heads have these scores."""
    return {f"{i}-{j}": [score] for i, row in enumerate(rows) for j, score in enumerate(row)}


def test_rows_follow_the_formula_of_headkv(tmp_path: Path) -> None:
    """2 layers, 2 kv heads, 4 query heads: the mean of a head's scores, summed over its group."""
    file = tmp_path / "profile.json"
    scores = {"0-0": [1, 3], "0-1": [2], "0-2": [0.5, 0.5, 0.5], "0-3": [0.5]}
    scores |= {"1-0": [1], "1-1": [1], "1-2": [2], "1-3": [1]}
    file.write_text(json.dumps(scores), encoding="utf-8")
    rows = headkv(str(file), 108, head_beta=2).row_tokens(1000, 2, 2)
    # Group sums 4, 1, 2, 3 of 10; b = 100: 50 for each and 4 * 50 = 200 by share.
    assert rows.tolist() == [[8 + 50 + 80, 8 + 50 + 20], [8 + 50 + 40, 8 + 50 + 60]]
    assert rows.dtype == np.int32
    assert not headkv(str(file), 108).ragged, "known before anything is selected"
    with pytest.raises(ValueError, match="read-only"):
        rows[0, 0] = 1


def test_the_numbers_travel_without_their_file(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"0-0": [0.1, 0.2], "0-1": [1e-9]}), encoding="utf-8")
    retention = headkv(file, "25%")
    file.unlink()
    again = pickle.loads(pickle.dumps(retention))
    assert again == retention
    assert hash(again) == hash(retention)
    assert Retention.parse(json.loads(json.dumps(retention.to_dict()))) == retention
    assert Retention.parse(retention, 64).profile == retention.profile
    assert again.profile is not None
    assert retention.label == f"headkv@25%,window=8,profile={again.profile.digest}"
    other = headkv({"0-0": [0.1, 0.2], "0-1": [2e-9]}, "25%")
    assert other != retention
    assert other.label != retention.label


def fill_oracle(base: Fraction, shares: list[Fraction], total: int, floor: int, cap: int) -> Any:
    """Grow all rows together, each as fast as its share, until the total is reached.

    A row that the formula gives less than `floor` has `floor` until its own line passes it.
    """
    amount, step = Fraction(0), Fraction(total)
    while step > Fraction(1, 10**9):  # bisection, so that it shares nothing with the code
        tried = amount + step
        rows = [min(max(base + share * tried, Fraction(floor)), Fraction(cap)) for share in shares]
        if sum(rows) <= total:
            amount = tried
        else:
            step /= 2
    return [min(max(base + share * amount, Fraction(floor)), Fraction(cap)) for share in shares]


@given(
    shares=st.lists(st.sampled_from([1, 2, 3, 10, 50]), min_size=6, max_size=6),
    budget=st.integers(WINDOW + SINKS + 1, 60),
    beta=st.sampled_from([1, 1.01, 2, 20]),
    dropped=st.integers(1, 100),
)
def test_rows_sum_to_the_budget_within_their_bounds(
    shares: list[int], budget: int, beta: float, dropped: int
) -> None:
    """3 layers of 2 heads; what a cap or a floor takes or gives is redistributed by share."""
    prompt_tokens = budget + dropped
    profile = table([[float(share) for share in shares[i : i + 2]] for i in (0, 2, 4)])
    rows = headkv(profile, budget, head_beta=beta).row_tokens(prompt_tokens, 3, 2)
    assert rows.sum() == 3 * 2 * budget
    assert rows.min() >= WINDOW + SINKS
    assert rows.max() <= prompt_tokens
    weights = [Fraction(share) / sum(shares) for share in shares]
    base = WINDOW + (budget - WINDOW) * (1 - 1 / Fraction(str(beta)))
    exact = fill_oracle(base, weights, 6 * budget, WINDOW + SINKS, prompt_tokens)
    for count, value in zip(rows.flatten().tolist(), exact, strict=True):
        # Rounded down, or one more for those that the remainder goes to.
        assert value - 1 - Fraction(1, 10**5) < count <= value + 1 + Fraction(1, 10**5)


def test_heads_without_a_share_get_more_only_when_all_others_are_full() -> None:
    profile = table([[1.0, 0.0], [0.0, 0.0]])
    assert headkv(profile, 20).row_tokens(50, 2, 2).tolist() == [[44, 12], [12, 12]]
    # 4 * 40 = 160: 50 for the full one, the rest equally.
    assert headkv(profile, 40).row_tokens(50, 2, 2).tolist() == [[50, 37], [37, 36]]
    assert headkv(profile, 50).row_tokens(50, 2, 2).tolist() == [[50, 50], [50, 50]]


def test_skipped_layers_leave_the_rest_to_the_others() -> None:
    rows = headkv(table([[9.0, 9.0], [3.0, 1.0]]), 60, skip_layers=[0], head_beta=1).row_tokens(
        100, 2, 2
    )
    # 4 * 60 - 2 * 100 = 40 for layer 1, less two windows of 8: 24, of which 3/4 and 1/4.
    assert rows.tolist() == [[100, 100], [8 + 18, 8 + 6]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"{file}: is not JSON \("),
        ('{"0-0": [1], "0-0": [2]}', r"{file}: '0-0' is there twice"),
        ("[1, 2]", r"{file}: must hold an object {{'layer-head': \[scores\]}}"),
        ("{}", "{file}: holds no head"),
        ('{"0": [1]}', "{file}: key '0' must be '<layer>-<head>'"),
        ('{"0-01": [1]}', "{file}: key '0-01' must be '<layer>-<head>'"),
        ('{"0-0": 1}', "{file}: key '0-0': must be a list of scores, not 1"),
        ('{"0-0": []}', "{file}: key '0-0': must be a list of scores"),
        ('{"0-0": [1], "0-1": [-1]}', "{file}: key '0-1': scores must be finite .* not -1"),
        ('{"0-0": [NaN]}', r"{file}: 0-0\[0\]: JSON has finite numbers alone, not NaN"),
        ('{"0-0": ["1"]}', "{file}: key '0-0': scores must be finite numbers"),
        ('{"0-0": [1], "1-1": [1]}', "{file}: key '0-1' is missing; with 2 layers and 2 heads"),
        ('{"0-0": [0]}', "{file}: all scores are 0"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="^profile: " + message.format(file=file)):
        headkv(file, 64)


def test_a_profile_of_another_model_is_refused() -> None:
    retention = headkv(table([[1.0] * 6, [2.0] * 6]), 64)
    assert retention.row_tokens(1000, 2, 3).sum() == 6 * 64
    message = "^profile: has 2 layers of 6 query heads, which is no profile of this model of"
    for num_layers, num_heads in [(3, 3), (2, 4)]:
        with pytest.raises(ValueError, match=message):
            retention.row_tokens(1000, num_layers, num_heads)


def test_a_profile_is_valid_however_it_is_made() -> None:
    for scores in [(), ((),), ((1.0,), (1.0, 2.0)), ((math.inf,),), ((-1.0,),), ((0.0, 0.0),)]:
        with pytest.raises(ValueError, match=r"^profile: "):
            HeadProfile(scores)

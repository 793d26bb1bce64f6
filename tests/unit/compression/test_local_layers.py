"""Layers with a window keep it; budgets are about the others, as if they were the whole model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saqqara.compression.growth import trimmed_rows
from saqqara.compression.layers import Layers
from saqqara.compression.retention import Retention

GEMMA = Layers((512, 512, 512, 512, 512, 0) * 3)
"""Gemma 3 270M: every sixth layer sees all tokens."""


def test_a_budget_is_the_mean_of_the_layers_that_see_all() -> None:
    kept = Retention.parse("pyramidkv", 256).layer_tokens(4000, GEMMA)
    assert [kept[layer] for layer in GEMMA.local_layers] == [512] * 15
    assert [kept[layer] for layer in GEMMA.global_layers] == [469, 256, 43]
    assert Retention.parse("snapkv", "25%").layer_tokens(1000, GEMMA)[4:6] == (512, 250)


def test_full_retention_keeps_windows_and_all_that_global_layers_see() -> None:
    assert Retention().layer_tokens(700, GEMMA) == (512, 512, 512, 512, 512, 700) * 3
    assert Retention().layer_tokens(100, GEMMA) == (100,) * 18
    assert Retention().layer_tokens(700, Layers((64, 64))) == (64, 64)
    assert Retention().entering_tokens(700, GEMMA) == (700,) * 18


PROFILE = {f"{layer}-{head}": [0.1 + layer * head] for layer in range(6) for head in range(4)}
SETTINGS = {
    "uniform": "snapkv",
    "pyramid": "pyramidkv",
    "cosine": "snapkv-cosine",
    "adaptive": "adakv",
    "profile": {"method": "headkv", "profile": PROFILE},
}


@given(
    windows=st.lists(st.sampled_from([0, 9]), min_size=6, max_size=6).filter(lambda w: 0 in w),
    name=st.sampled_from(sorted(SETTINGS)),
    prompt_tokens=st.integers(1, 90),
    budget=st.integers(8, 60),
)
def test_global_layers_share_their_budget_as_a_model_of_their_own(
    windows: list[int], name: str, prompt_tokens: int, budget: int
) -> None:
    layers, setting = Layers(tuple(windows)), SETTINGS[name]
    given_setting = setting if isinstance(setting, dict) else {"method": setting}
    retention = Retention.parse({**given_setting, "window": 3, "sinks": 2}, budget)
    alone = retention
    numbers = list(layers.global_layers)
    if name == "profile":
        own = {f"{i}-{h}": PROFILE[f"{n}-{h}"] for i, n in enumerate(numbers) for h in range(4)}
        if not any(map(any, own.values())):
            return
        alone = Retention.parse({**given_setting, "window": 3, "sinks": 2, "profile": own}, budget)
    rows = retention.row_tokens(prompt_tokens, layers, 2)
    assert (rows[numbers] == alone.row_tokens(prompt_tokens, len(numbers), 2)).all()
    assert (rows[list(layers.local_layers)] == min(prompt_tokens, 9)).all()
    total = len(numbers) * 2 * retention.budget_tokens(prompt_tokens)
    assert rows[numbers].sum() == total


def test_skipped_layers_are_those_of_the_model_and_see_all() -> None:
    layers = Layers((9, 0, 9, 0, 0))
    knorm = {"method": "knorm", "budget": 20, "window": 2, "sinks": 1}
    kept = Retention.parse({**knorm, "skip_layers": [3]}).layer_tokens(40, layers)
    assert kept == (9, 10, 9, 40, 10)
    local = Retention.parse({**knorm, "skip_layers": [2]})
    with pytest.raises(ValueError, match=r"skip_layers: layer 2 sees 9 tokens only.*: 1, 3, 4"):
        local.layer_tokens(40, layers)


def test_a_profile_that_measured_only_other_layers_gives_each_the_same() -> None:
    profile = {"0-0": [1.0], "1-0": [0.0], "2-0": [0.0]}
    retention = Retention.parse({"method": "headkv", "profile": profile, "budget": 50})
    assert np.ravel(retention.row_tokens(100, Layers((9, 0, 0)), 1)).tolist() == [9, 50, 50]


@pytest.mark.parametrize("name", ["pyramidinfer", "fastkv", "recommended-fast"])
def test_propagation_is_refused_where_a_layer_has_a_window(name: str) -> None:
    budget = None if name == "pyramidinfer" else 64
    retention = Retention.parse(name, budget)
    message = r"propagate: .* \(15 of its 18 layers see a window of 512 tokens\)"
    for count in (
        lambda: retention.entering_tokens(1, GEMMA),
        lambda: retention.row_tokens(1, GEMMA, 1),
    ):
        with pytest.raises(ValueError, match=message):
            count()


def test_trimming_is_refused_with_it() -> None:
    trimmed = Retention.parse({"method": "pyramidinfer", "decode": True})
    with pytest.raises(ValueError, match="propagate: 'pyramidinfer' drops hidden states"):
        trimmed_rows(trimmed, 100, GEMMA)


@pytest.mark.parametrize("name", ["snapkv", "adakv", "tova", "streaming"])
def test_a_budget_is_refused_where_no_layer_sees_all(name: str) -> None:
    with pytest.raises(ValueError, match="budget: every layer of this model sees a window of 8 "):
        Retention.parse(name, 64).row_tokens(1, Layers((8, 8)), 2)

"""Retention settings: how they are written, what is refused, and how budgets spread over layers."""

import json
import math
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from saqqara.compression import retention as retention_file
from saqqara.compression.retention import Retention
from saqqara.compression.scores import SCORES, KNorm, Random, Score, SnapKV
from saqqara.compression.shapes import MEANS, SHAPES, Adaptive, LayerShape, Pyramid, Uniform, settle
from saqqara.compression.spelling import IN_LABELS, Kinds
from saqqara.configs.yaml_files import CONFIG_DIR

BUDGETED = [
    "ada-pyramidkv",
    "adakv",
    "fastkv",
    "h2o",
    "knorm",
    "pyramidkv",
    "random",
    "recommended",
    "recommended-adaptive",
    "recommended-fast",
    "snapkv",
    "streaming",
    "tova",
]
NEED_A_PROFILE = ["headkv"]
UNBUDGETED = ["full", *(f"pyramidinfer{size}" for size in ("", "-13b", "-70b", "-7b", "-steep"))]
PROFILE = {"0-0": [1.0], "0-1": [2.0]}


def test_a_name_and_a_budget_are_all_it_takes() -> None:
    retention = Retention.parse("pyramidkv", 256)
    assert (retention.score, retention.shape) == (SnapKV(), Pyramid(beta=20))
    assert (retention.budget, retention.window, retention.sinks) == (256, 32, 4)
    assert retention.label == "pyramidkv@256"
    assert sum(retention.layer_tokens(prompt_tokens=2000, layers=30)) == 30 * 256


def test_every_preset_is_known_by_its_file_name() -> None:
    files = sorted(file.stem for file in (CONFIG_DIR / "retention").glob("*.yaml"))
    assert files == sorted(BUDGETED + NEED_A_PROFILE + UNBUDGETED)
    for name in BUDGETED + UNBUDGETED:
        retention = Retention.parse(name, "25%" if name in BUDGETED else None)
        assert retention.method == name
        assert retention.label == f"{name}{'@25%' if name in BUDGETED else ''}"
        assert Retention.parse(json.loads(json.dumps(retention.to_dict()))) == retention


def test_nothing_means_full() -> None:
    assert Retention.parse(None) == Retention.parse("full") == Retention()
    full = Retention()
    assert not full.drops(10**6)
    assert full.budget_tokens(1000) == 1000
    assert full.layer_tokens(1000, 3) == (1000, 1000, 1000)
    assert full.num_window_queries(1000) == 0
    assert full.to_dict() == {"method": "full"}
    assert full.label == "full"


def test_any_score_goes_with_any_shape() -> None:
    for score in SCORES:
        for shape in SHAPES:
            if SCORES[score].scope == "token" and SHAPES[shape].heads_differ:
                continue
            more = {"profile": PROFILE} if shape == "profile" else {}
            by_name = Retention.parse({"method": f"{score}-{shape}", "budget": "25%", **more})
            by_fields = Retention.parse({"score": score, "shape": shape, "budget": "25%", **more})
            assert by_name == by_fields
            assert (type(by_name.score), type(by_name.shape)) == (SCORES[score], SHAPES[shape])
            for mean in ("uniform", "pyramid", "cosine") if shape == "adaptive" else ():
                spread = Retention.parse(f"{score}-adaptive-{mean}", "25%")
                assert spread.score == by_name.score
                assert spread.shape == Adaptive(MEANS[mean]())


def test_another_score_or_shape_takes_the_name_away() -> None:
    """A report must not call `pyramidkv` what is none; the preset's `beta` goes with the shape."""
    flat = Retention.parse({"method": "pyramidkv", "shape": "uniform", "budget": 128})
    assert flat.method == "snapkv-uniform"
    assert flat.label == "snapkv-uniform@128"
    norms = Retention.parse({"method": "pyramidkv", "score": "knorm", "budget": 128})
    assert norms.method == "knorm-pyramid"
    same = Retention.parse({"method": "pyramidkv", "score": "snapkv", "budget": 128})
    assert same.method == "pyramidkv"
    level = Retention.parse({"method": "ada-pyramidkv", "mean": "uniform", "budget": 128})
    assert (level.label, level.shape) == ("snapkv-adaptive@128", Adaptive(Uniform()))
    steep = Retention.parse({"method": "adakv", "mean": "pyramid", "beta": 5, "budget": 128})
    assert steep.label == "snapkv-adaptive-pyramid@128,beta=5"
    assert Retention.parse({"method": "ada-pyramidkv", "shape": "uniform"}, 128) == flat


def test_a_score_may_fix_the_window() -> None:
    """`h2o`'s recent part takes its place, `tova` looks at one query; another score frees it."""
    for score, window in [("h2o", 0), ("tova", 1)]:
        for spec in (score, {"method": score, "window": window}, {"score": score}):
            retention = Retention.parse(spec, 64)
            assert retention.window == window
            assert Retention.parse(retention.to_dict()) == retention
        changed = Retention.parse({"method": "snapkv", "score": score}, 64)
        assert (changed.window, changed.label) == (window, f"{score}-uniform@64")
        back = Retention.parse({"method": score, "score": "snapkv"}, 64)
        assert (back.window, back.label) == (32, "snapkv-uniform@64")
    assert Retention.parse({"method": "h2o", "sinks": 0}, 64).num_window_queries(500) == 500
    assert Retention.parse("tova", 64).num_window_queries(500) == 1


@pytest.mark.parametrize(
    ("ratio", "sinks", "kept", "recent"),
    [
        (0.5, 4, 64, 32),
        (0.5, 4, 65, 32),
        (0.29, 0, 100, 29),  # which in floating point would be 28.999999999999996
        (0.5, 4, 6, 2),  # what the sinks leave
        (0, 0, 64, 0),
        (1, 4, 64, 60),
    ],
)
def test_recent_part(ratio: float, sinks: int, kept: int, recent: int) -> None:
    retention = Retention.parse({"method": "h2o", "sinks": sinks, "recent_ratio": ratio}, 64)
    assert retention.recent_tokens(kept) == recent
    assert Retention.parse("snapkv", 64).recent_tokens(kept) == 32


def test_label_tells_departures_from_the_defaults() -> None:
    retention = Retention.parse(
        {"method": "snapkv", "budget": "12.5%", "window": 16, "skip_layers": [0, 1]}
    )
    assert retention.label == "snapkv@12.5%,window=16,skip_layers=[0,1]"


@pytest.mark.parametrize(
    ("budget", "tokens", "share"),
    [
        (256, 256, None),
        ("256", 256, None),
        ("25%", None, 0.25),
        (" 7 % ", None, 0.07),
        ("12.5%", None, 0.125),
        ("100%", None, 1.0),
    ],
)
def test_budgets_as_users_write_them(
    budget: int | str, tokens: int | None, share: float | None
) -> None:
    for retention in (
        Retention.parse("snapkv", budget),
        Retention.parse({"method": "snapkv", "budget": budget}),
        Retention.parse({"method": "snapkv", "budget": budget}, budget),
        Retention.parse(Retention.parse("snapkv", 99), budget),
        Retention.parse(Retention.parse("snapkv", "99%"), budget),
    ):
        assert (retention.budget, retention.share) == (tokens, share)


@pytest.mark.parametrize(
    ("spec", "budget", "message"),
    [
        ("full", 256, "budget: 'full' keeps everything"),
        (None, "25%", "budget: 'full' keeps everything"),
        ({"method": "full", "window": 8}, None, "window: 'full' keeps everything"),
        ("snapkv", None, "budget: 'snapkv' needs one"),
        ({"method": "snapkv", "budget": None}, None, "budget: 'snapkv' needs one"),
        ("snapkv", 36, "budget: 36 tokens are too few .* at least 37"),
        ("snapkv", 0, "budget: must be an integer of at least 1 and at most 16777216, not 0"),
        ("snapkv", "0%", "budget: a share must lie above 0%"),
        ("snapkv", "101%", "budget: a share must lie above 0% and up to 100%"),
        ("snapkv", "-5%", "budget: must be tokens or a share such as '25%', not '-5%'"),
        ("snapkv", "many", "budget: must be tokens or a share such as '25%', not 'many'"),
        (
            "snapkv",
            0.25,
            "budget: 0.25 is no number of tokens; a share is written with a percent sign: '25%'",
        ),
        ("snapkv", True, "budget: must be tokens or a share such as '25%', not True"),
        ({"method": "snapkv", "budget": 64}, 128, "budget: given twice, as 64 and as 128"),
        ("pyramid", 256, "method: unknown 'pyramid'; did you mean 'pyramidkv'"),
        ("snapkv-cubic", 256, "method: unknown 'snapkv-cubic'; .* shapes adaptive, cosine, pro"),
        ("snapkv-uniform-pyramid", 256, "method: unknown 'snapkv-uniform-pyramid'"),
        ("snapkv-adaptive-cubic", 256, "method: unknown .*did you mean 'snapkv-adaptive'"),
        ("../schema", 256, "method: unknown .*adaptive also -<mean>: cosine"),
        ("", None, "method: unknown ''"),
        ({"method": ["snapkv"]}, 256, r"method: unknown \['snapkv'\]"),
        ({"budget": 256}, None, "method: missing; known: ada-pyramidkv"),
        ({"score": "best"}, 256, "score: unknown 'best'; known: h2o, knorm, random, snapkv"),
        ({"score": ["knorm"]}, 256, r"score: unknown \['knorm'\]"),
        ({"method": "snapkv", "score": None}, 256, "score: unknown None"),
        ({"method": "snapkv", "shape": "cubic"}, 256, "shape: unknown 'cubic'; known: adaptive, "),
        ({"method": "knorm", "windows": 8}, 256, "windows: not a .*; allowed: method, .* window"),
        ({"method": "knorm", "beta": 20}, 256, "beta: not a setting of score 'knorm' with shape"),
        ({"method": "snapkv", "seed": 1}, 256, "seed: not a setting of score 'snapkv'"),
        ({"method": "snapkv", 5: 1}, 256, "5: not a setting"),
        ({"method": "snapkv", "window": 0}, 256, "window: must be an integer of at least 1"),
        ({"method": "knorm", "window": -1}, 256, "window: must be an integer of at least 0"),
        ({"method": "knorm", "window": "8"}, 256, "window: must be an integer of at least 0"),
        ({"method": "knorm", "window": True}, 256, "window: must be an integer of at least 0"),
        ({"method": "knorm", "sinks": 1.5}, 256, "sinks: must be an integer of at least 0"),
        ({"method": "snapkv", "kernel_size": 4}, 256, "kernel_size: must be odd, not 4"),
        ({"method": "snapkv", "kernel_size": 0}, 256, "kernel_size: must be an integer of"),
        ({"method": "snapkv", "pooling": "mean"}, 256, "pooling: must be 'max' or 'avg'"),
        ({"method": "pyramidkv", "beta": 0.5}, 256, "beta: must be a number from 1 to"),
        ({"method": "pyramidkv", "beta": float("nan")}, 256, "beta: must be a number from 1 to"),
        ({"method": "pyramidkv", "beta": "20"}, 256, "beta: must be a number from 1 to"),
        ({"method": "adakv", "mean": "cubic"}, 256, "mean: unknown 'cubic'; known: cosine, pyr"),
        ({"method": "adakv", "mean": ["uniform"]}, 256, r"mean: unknown \['uniform'\]"),
        ({"method": "adakv", "beta": 5}, 256, "beta: not a setting of score 'snapkv' with shape"),
        ({"method": "snapkv", "mean": "uniform"}, 256, "mean: not a setting of score 'snapkv'"),
        ({"method": "adakv", "floor_ratio": 1.1}, 256, "floor_ratio: must be a number from 0 to 1"),
        ({"method": "h2o", "recent_ratio": -0.1}, 256, "recent_ratio: must be a number from 0 to"),
        ({"method": "h2o", "recent_ratio": "half"}, 256, "recent_ratio: must be a number from 0"),
        ({"method": "h2o", "window": 32}, 256, "window: must be 0 for score 'h2o', not 32"),
        ({"method": "tova", "window": True}, 256, "window: must be 1 for score 'tova', not True"),
        ({"method": "tova", "kernel_size": 3}, 256, "kernel_size: not a setting of score 'tova'"),
        ({"method": "tova", "shape": "adaptive"}, 256, "shape: 'adaptive' lets heads .* 'tova'"),
        ("tova-profile", 256, "shape: 'profile' lets heads .* take cosine, pyramid, uniform"),
        ("headkv", 256, "profile: 'headkv' needs the path of a JSON file with measured scores"),
        ({"method": "headkv", "profile": 3}, 256, "profile: must be the path of a JSON file"),
        ({"method": "headkv", "profile": "no.json"}, 256, "profile: no.json: cannot be read"),
        ({"method": "snapkv", "profile": "no.json"}, 256, "profile: not a setting of score"),
        (
            {"method": "headkv", "head_beta": 0.9, "profile": {"0-0": [1]}},
            256,
            r"head_beta: must be a number from 1 to 1e\+06, not 0.9",
        ),
        ({"method": "random", "seed": -1}, 256, "seed: must be an integer of at least 0"),
        (
            {"method": "random", "seed": 2**64},
            256,
            "seed: must be an integer of at least 0 and at most 18446744073709551615",
        ),
        ({"method": "knorm", "skip_layers": 1}, 256, "skip_layers: must be a list of layers"),
        ({"method": "knorm", "skip_layers": [-1]}, 256, "skip_layers: must be an integer of at"),
        ({"method": "knorm", "skip_layers": [2, 1]}, 256, "skip_layers: must rise, each layer"),
        (7, None, "retention: must be a name or a mapping of settings, not int 7"),
    ],
)
def test_what_is_wrong_is_named(spec: Any, budget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Retention.parse(spec, budget)


def test_a_retention_is_valid_however_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"^seed: must be an integer of at least 0"):
        Retention(method="random", score=Random(seed=-1), budget=64)
    for wrong in (["a"], 5, ""):
        with pytest.raises(ValueError, match=r"^method: must be a name, not "):
            Retention(method=wrong, score=KNorm(), budget=64)  # type: ignore[arg-type]
    stages: tuple[Any, ...] = ({}, "once")
    for stage in stages:
        with pytest.raises(ValueError, match=r"^propagate: must be a Propagate, not "):
            Retention(method="x", propagate=stage)
    with pytest.raises(ValueError, match=r"^score: must be a value of scores.py, not Score"):
        Retention(method="x", score=Score(), budget=64)
    with pytest.raises(ValueError, match=r"^shape: must be a value of shapes.py, not LayerS"):
        Retention(method="x", score=KNorm(), shape=LayerShape(), budget=64)
    with pytest.raises(ValueError, match=r"^window: 'full' takes no such setting"):
        Retention(window=32.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^score: must be a value of scores.py, not 'knorm'"):
        Retention(method="knorm", score="knorm", budget=64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^shape: must be a value of shapes.py, not 'pyramid'"):
        Retention(method="knorm", score=KNorm(), shape="pyramid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^mean: must be cosine or pyramid or uniform, not "):
        Adaptive(mean=Adaptive())
    with pytest.raises(ValueError, match=r"^window: 'full' takes no such setting"):
        Retention(window=8)
    with pytest.raises(ValueError, match=r"^score: method 'full' cannot have score 'knorm'"):
        Retention(score=KNorm(), budget=64)
    with pytest.raises(ValueError, match=r"^budget: 'knorm' needs one"):
        Retention(method="knorm", score=KNorm(), budget=64, share=0.5)


def test_every_setting_has_its_place_in_labels() -> None:
    """Or two results that differ in it would have one name."""
    kinds = [Kinds(score, shape) for score in SCORES for shape in SHAPES]
    kinds += [Kinds("snapkv", "adaptive", mean) for mean in MEANS]
    taken = {name for each in kinds for name in each.defaults}
    assert taken - {"budget", "mean"} == set(IN_LABELS)


def test_without_tensors_there_is_no_torch() -> None:
    """Scheduler, planner and simulator count what is kept; the command line lists methods."""
    with_tensors = {"observation", "scoring", "selecting"}
    names = {file.stem for file in Path(retention_file.__file__).parent.glob("*.py")}
    assert with_tensors < names
    modules = ", ".join(f"saqqara.compression.{name}" for name in sorted(names - with_tensors))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import sys, saqqara.compression.scoring; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


settings = st.fixed_dictionaries(
    {
        "method": st.sampled_from(
            [
                "snapkv-uniform",
                "pyramidkv",
                "snapkv-pyramid",
                "snapkv-cosine",
                "adakv",
                "ada-pyramidkv",
                "knorm-adaptive-cosine",
            ]
        ),
        "budget": st.one_of(
            st.integers(40, 10_000),
            st.decimals(min_value="0.001", max_value=100, places=3).map(lambda share: f"{share}%"),
        ),
        "window": st.integers(1, 32),
        "sinks": st.integers(0, 7),
        "skip_layers": st.lists(st.integers(0, 20), unique=True, max_size=3).map(sorted),
    }
)


@given(settings)
def test_parse_reads_back_what_is_written(given_settings: dict[str, Any]) -> None:
    retention = Retention.parse(given_settings)
    assert Retention.parse(retention) is retention
    again = Retention.parse(json.loads(json.dumps(retention.to_dict())))
    assert again == retention
    assert hash(again) == hash(retention)
    assert pickle.loads(pickle.dumps(retention)) == retention


@pytest.mark.parametrize(
    ("budget", "prompt_tokens", "expected"),
    [
        (256, 2000, 256),
        (256, 256, 256),
        (256, 100, 100),
        ("25%", 2000, 500),
        ("25%", 1998, 500),  # 499.5: halves round up
        ("25%", 1997, 499),
        ("7%", 1050, 74),  # 73.5, which in floating point would be 73.50000000000001
        ("29%", 150, 44),  # 43.5, which in floating point would be 43.49999999999999
        ("25%", 100, 37),  # raised to window + sinks + 1
        ("25%", 37, 37),
        ("25%", 5, 5),
        ("100%", 777, 777),
    ],
)
def test_budget_of_a_prompt(budget: int | str, prompt_tokens: int, expected: int) -> None:
    retention = Retention.parse("snapkv", budget)
    assert retention.budget_tokens(prompt_tokens) == expected
    assert retention.drops(prompt_tokens) == (expected < prompt_tokens)


def test_queries_are_asked_for_only_where_a_score_looks_at_them() -> None:
    for name, num_queries in [
        ("snapkv", 32),
        ("streaming", 0),
        ("knorm", 0),
        ("random", 0),
        ("h2o", 101),
        ("tova", 1),
    ]:
        retention = Retention.parse(name, 100)
        assert retention.num_window_queries(101) == num_queries
        assert retention.num_window_queries(100) == 0  # nothing will be dropped


def pyramid_oracle(
    n: int, num_layers: int, budget: int, window: int, sinks: int, beta: int
) -> list[int]:
    """The definition, with exact fractions: linear, then integers from the lowest layer up."""
    c = Fraction(budget - window)
    c_min = max(Fraction(sinks), c / beta)
    c_max = 2 * c - c_min
    if c_max > n - window:
        c_max = Fraction(n - window)
        c_min = 2 * c - c_max
    exact = [
        window + c_max - layer * (c_max - c_min) / (num_layers - 1) for layer in range(num_layers)
    ]
    kept = [value.numerator // value.denominator for value in exact]
    left = num_layers * budget - sum(kept)
    for layer in range(num_layers):
        if left > 0 and kept[layer] < n:
            kept[layer] += 1
            left -= 1
    return kept


def test_pyramid_of_the_design() -> None:
    """B = 256 on 30 layers: 71% of what is kept lies in the lower half."""
    tokens = Retention.parse("pyramidkv", 256).layer_tokens(2000, 30)
    assert tokens[0] == 469  # 32 + 2 * 224 - 224 / 20 = 468.8, and the remainder
    assert tokens[-1] == 43  # 32 + 224 / 20 = 43.2
    assert 100 * sum(tokens[:15]) // sum(tokens) == 71


def test_pyramid_bends_to_a_short_prompt_and_never_goes_uniform() -> None:
    """Where KVCache-Factory turns uniform: the bottom layer keeps all, the top one rises."""
    retention = Retention.parse("pyramidkv", 256)
    assert retention.layer_tokens(300, 5) == (300, 278, 256, 234, 212)
    assert retention.layer_tokens(257, 5) == (257, 257, 256, 255, 255)


@given(
    num_layers=st.integers(2, 100),
    window=st.integers(1, 40),
    sinks=st.integers(0, 8),
    beta=st.integers(1, 50),
    extra=st.integers(1, 2000),
    dropped=st.integers(1, 5000),
)
def test_pyramid_budgets(
    num_layers: int, window: int, sinks: int, beta: int, extra: int, dropped: int
) -> None:
    budget = window + sinks + extra
    n = budget + dropped
    retention = Retention.parse(
        {"method": "pyramidkv", "window": window, "sinks": sinks, "beta": beta}, budget
    )
    tokens = retention.layer_tokens(n, num_layers)
    assert list(tokens) == pyramid_oracle(n, num_layers, budget, window, sinks, beta)
    assert sum(tokens) == num_layers * budget
    assert list(tokens) == sorted(tokens, reverse=True)
    assert tokens[0] <= n
    assert tokens[-1] >= window + sinks
    if beta > 1 and extra > 2 * num_layers and dropped > 2 * num_layers and sinks < extra:
        assert tokens[0] > tokens[-1]


def test_cosine_lies_between_the_ends_of_the_pyramid() -> None:
    """c_min = 224 / 20 = 11.2, c_max = 448 - c_min, and a half cosine from one to the other."""
    exact = [32 + 11.2 + 425.6 * (math.cos(math.pi * layer / 4) + 1) / 2 for layer in range(5)]
    tokens = Retention.parse("snapkv-cosine", 256).layer_tokens(2000, 5)
    assert sum(tokens) == 5 * 256
    assert all(abs(count - value) < 1 for count, value in zip(tokens, exact, strict=True))
    pyramid = Retention.parse("pyramidkv", 256).layer_tokens(2000, 5)
    assert (tokens[0], tokens[-1]) == (pyramid[0], pyramid[-1])
    assert tokens[1] > pyramid[1]
    assert tokens[3] < pyramid[3]
    assert Retention.parse("snapkv-cosine", 256).layer_tokens(2000, 1) == (256,)


@given(
    shape=st.sampled_from(sorted(set(SHAPES) - {"profile"})),
    num_layers=st.integers(1, 40),
    prompt_tokens=st.integers(1, 3000),
    budget=st.one_of(st.integers(9, 1000), st.sampled_from(["1%", "10%", "33.3%", "100%"])),
    skip_layers=st.lists(st.integers(0, 39), unique=True, max_size=3).map(sorted),
)
def test_layers_sum_to_the_budget_or_it_is_an_error(
    shape: str, num_layers: int, prompt_tokens: int, budget: int | str, skip_layers: list[int]
) -> None:
    assume(not skip_layers or skip_layers[-1] < num_layers)
    retention = Retention.parse(
        {"score": "knorm", "shape": shape, "window": 4, "skip_layers": skip_layers}, budget
    )
    mean = retention.budget_tokens(prompt_tokens)
    try:
        tokens = retention.layer_tokens(prompt_tokens, num_layers)
    except ValueError:
        others = num_layers - len(skip_layers)
        least = len(skip_layers) * prompt_tokens + others * (4 + 4)
        assert retention.drops(prompt_tokens)
        assert least > num_layers * mean
        return
    assert sum(tokens) == num_layers * mean
    assert all(min(8, prompt_tokens) <= count <= prompt_tokens for count in tokens)
    assert all(tokens[layer] == prompt_tokens for layer in skip_layers)
    rows = retention.row_tokens(prompt_tokens, num_layers, num_heads=3)
    assert rows.dtype == np.int32
    assert rows.tolist() == [[count] * 3 for count in tokens]


def test_remainder_goes_to_the_lowest_layers() -> None:
    """Layer 1 keeps all 100; what is left of 4 x 40 is 60 for three layers, then 59 and 61."""
    for prompt_tokens, expected in [
        (100, (20, 100, 20, 20)),
        (99, (21, 99, 20, 20)),
        (101, (20, 101, 20, 19)),
    ]:
        retention = Retention.parse({"method": "knorm", "window": 8, "skip_layers": [1]}, 40)
        assert retention.layer_tokens(prompt_tokens, 4) == expected


def test_skip_layers_that_cannot_be_paid_for() -> None:
    retention = Retention.parse({"method": "knorm", "skip_layers": [0, 1]}, 100)
    assert retention.layer_tokens(100, 2) == (100, 100)
    with pytest.raises(ValueError, match=r"^skip_layers: 2 of 2 layers keep all 101 tokens"):
        retention.layer_tokens(101, 2)
    with pytest.raises(ValueError, match="takes a budget of at least 144"):
        retention.layer_tokens(1000, 18)
    enough = Retention.parse(retention, 144)
    assert sum(enough.layer_tokens(1000, 18)) == 18 * 144
    with pytest.raises(ValueError, match=r"^skip_layers: 1 is no layer of this model"):
        retention.layer_tokens(50, 1)


def test_a_model_of_one_layer_keeps_the_budget() -> None:
    for name in ("pyramidkv", "snapkv"):
        assert Retention.parse(name, 64).layer_tokens(1000, 1) == (64,)


def test_row_tokens_cannot_be_changed_by_a_caller() -> None:
    rows = Retention.parse("snapkv", 64).row_tokens(1000, 2, 3)
    with pytest.raises(ValueError, match="read-only"):
        rows[0, 0] = 1


@given(
    weights=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    floor=st.integers(0, 20),
    span=st.integers(0, 60),
    data=st.data(),
)
def test_settle_meets_bounds_and_total(
    weights: list[int], floor: int, span: int, data: st.DataObject
) -> None:
    """Any shape that a later method may ask for, however far beyond the bounds."""
    cap, num_layers = floor + span, len(weights)
    total = data.draw(st.integers(num_layers * floor, num_layers * cap))
    scale = Fraction(total, max(sum(weights), 1))
    targets = [weight * scale for weight in weights]
    if not any(weights):
        targets = [Fraction(total, num_layers)] * num_layers
    counts = settle(targets, total, floor, cap)
    assert sum(counts) == total
    assert all(floor <= count <= cap for count in counts)
    # The bounds share out equally, so the order of the targets stays, but for the remainder.
    for low, high in zip(range(num_layers - 1), range(1, num_layers), strict=True):
        if targets[low] >= targets[high]:
            assert counts[low] >= counts[high]
        else:
            assert counts[low] <= counts[high] + 1


def test_settle_shares_what_a_bound_takes_equally() -> None:
    targets = [Fraction(40), Fraction(8), Fraction(6), Fraction(-10)]
    # The cap takes 20 from the first, the floor gives 12 to the last: 4 each for those between.
    assert settle(targets, total=44, floor=2, cap=20) == [20, 12, 10, 2]


@pytest.mark.parametrize(
    "setting",
    [
        {"method": "random", "seed": range(100)},
        {"method": "pyramidkv", "beta": range(2, 102)},
        {"method": "snapkv", "kernel_size": range(1, 201, 2)},
        {"method": "snapkv", "decode": [{"slack_pages": n} for n in range(1, 101)]},
    ],
    ids=lambda setting: next(name for name in setting if name != "method"),
)
def test_settings_that_differ_in_anything_have_hashes_of_their_own(setting: dict[str, Any]) -> None:
    """Any setting may come with a request, and tables by retention are looked up in every step."""
    [(name, values)] = [(name, v) for name, v in setting.items() if name != "method"]
    found = {
        hash(Retention.parse({"method": setting["method"], "budget": 64, name: value}))
        for value in values
    }
    assert len(found) == 100


def test_a_hash_stays_in_its_process() -> None:
    """Those of strings differ from one to the next."""
    retention = Retention.parse("snapkv", 64)
    assert hash(retention) == hash(Retention.parse("snapkv", 64))
    there = "import pickle, sys; print({pickle.load(sys.stdin.buffer): 1}[pickle.loads(%r)])"
    code = there % pickle.dumps(Retention.parse("snapkv", 64))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=pickle.dumps(retention), capture_output=True, check=True)
    assert done.stdout.split() == [b"1"]
    assert "_hash" not in pickle.loads(pickle.dumps(retention)).__dict__


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"beta": 5}, {"beta": 5.0}),
        (
            {"propagate": {"kind": "pyramidinfer", "rho": 1}},
            {"propagate": {"kind": "pyramidinfer", "rho": 1.0}},
        ),
    ],
)
def test_equal_settings_have_one_label(one: dict[str, Any], other: dict[str, Any]) -> None:
    own: dict[str, Any] = {"method": "pyramidkv", "budget": 64}
    made = [Retention.parse(own | more) for more in (one, other)]
    assert made[0] == made[1]
    assert made[0].label == made[1].label


def test_odd_values_are_refused_in_words() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for wrong, said in [
        ({"method": "snapkv", "budget": 64, "pooling": np.array([1, 2])}, "^pooling: must be"),
        ({"method": "snapkv", "budget": 64, "decode": [deep]}, "^decode: .* nested too deep"),
        ({"method": "s" * 10_000_000, "budget": 64}, "^method: unknown"),
    ]:
        with pytest.raises(ValueError, match=said):
            Retention.parse(wrong)

"""Every number of a retention setting has bounds that the engine can bear."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from saqqara.compression.bounds import BOUNDS, Bound
from saqqara.compression.decode import DecodeStage, TrimStage
from saqqara.compression.profiles.head_profile import HeadProfile
from saqqara.compression.propagate import Propagate
from saqqara.compression.retention import Retention
from saqqara.compression.scores import SCORES
from saqqara.compression.scoring import pooled
from saqqara.compression.shapes import SHAPES
from saqqara.configs.shown import shown

PROFILE = {"0-0": [1.0]}
# What reads a setting, with its path in `Retention.parse`'s mapping.
HOSTS: dict[str, dict[str, Any]] = {
    "budget": {"method": "knorm", "window": 0, "sinks": 0},
    "window": {"method": "knorm", "budget": "50%"},
    "sinks": {"method": "knorm", "budget": "50%"},
    "skip_layers": {"method": "knorm", "budget": "50%"},
    "kernel_size": {"method": "snapkv", "budget": "50%"},
    "beta": {"method": "pyramidkv", "budget": "50%"},
    "seed": {"method": "random", "budget": "50%"},
    "recent_ratio": {"method": "h2o", "budget": "50%"},
    "floor_ratio": {"method": "adakv", "budget": "50%"},
    "head_beta": {"method": "headkv", "budget": "50%", "profile": PROFILE},
    "slack_pages": {"method": "snapkv", "budget": "50%"},
    "exceed": {"method": "pyramidinfer"},
    "layer": {"propagate": {"kind": "once"}},
    "keep": {"propagate": {"kind": "once"}},
    "propagate.window": {"propagate": {"kind": "once"}},
    "propagate.kernel_size": {"propagate": {"kind": "once"}},
    "propagate.sinks": {"propagate": {"kind": "once"}},
    "propagate.recent_ratio": {"propagate": {"kind": "pyramidinfer"}},
}


def setting(name: str, value: Any) -> dict[str, Any]:
    """A whole setting in which this field has the value."""
    part, _, field = name.rpartition(".")
    host = HOSTS.get(name) or HOSTS.get(field) or {"propagate": {"kind": "pyramidinfer"}}
    if name == "skip_layers":
        return host | {"skip_layers": [value]}
    if part:
        inner = host.get(part, {})
        more = {"sinks": 0} if field == "min_context" else {}
        return host | {part: inner | more | {field: value}}
    return host | {field: value}


def step(bound: Bound) -> float:
    if bound.is_integer:
        return 2 if bound.is_odd else 1
    return 1e-9


def test_the_table_has_every_number() -> None:
    """A field with a number that is not in it would go unchecked."""
    parts: list[tuple[str, Any]] = [("", Retention), ("propagate.", Propagate)]
    parts += [("decode.", DecodeStage), ("decode.", TrimStage)]
    parts += [("", kind) for kind in (*SCORES.values(), *SHAPES.values())]
    named = {
        f"{prefix}{field.name}"
        for prefix, kind in parts
        for field in fields(kind)
        if any(number in str(field.type) for number in ("int", "float"))
    }
    assert named == set(BOUNDS)


@pytest.mark.parametrize("name", [name for name in BOUNDS if name != "share"])
def test_each_bound_holds_on_both_sides(name: str) -> None:
    bound = BOUNDS[name]
    inside = [
        bound.least + step(bound) * bound.is_open,
        bound.most - step(bound) * bound.is_open_above,
    ]
    for value in inside:
        parsed = Retention.parse(setting(name, value))
        assert Retention.parse(parsed.to_dict()) == parsed
    low = bound.least - step(bound) * (not bound.is_open)
    outside = [low, bound.most + step(bound) * max(bound.most, 1) * (not bound.is_open_above)]
    if name == "propagate.layer":
        outside.remove(low)  # -1 is named below
    huge: list[Any] = [
        10**400,
        -(10**400),
        10**5000,
        float("inf"),
        float("nan"),
        "1",
        None,
        True,
        [1],
        {},
    ]
    for value in [*outside, *huge]:
        if name == "budget" and value in (None, "1"):
            continue  # says that it is missing, or 1
        with pytest.raises(ValueError, match=rf"^{name}: ") as error:
            Retention.parse(setting(name, value))
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("0.0000000001%", None),
        ("9" * 5000, "budget: must be tokens or a share"),
        (f"0.{'0' * 400}1%", "budget: must be tokens or a share"),
        pytest.param(10**5000, "budget: must be an integer of at least 1 .* bits", id="huge"),
        (2**24 + 1, "budget: must be an integer of at least 1 and at most 16777216"),
    ],
)
def test_budgets_of_any_length(budget: Any, message: str | None) -> None:
    if message is None:
        assert Retention.parse("snapkv", budget).budget_of(100) == 37
        return
    with pytest.raises(ValueError, match=f"^{message}"):
        Retention.parse("snapkv", budget)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ([], "profile: must be the path of a JSON file"),
        pytest.param(10**5000, "profile: must be the path", id="huge"),
        ({"0-0": [1e308, 1e308]}, "profile: key '0-0': scores must be finite .* to 1e\\+09"),
        ({"0-0": [10**400]}, "profile: key '0-0': scores must be finite"),
        ({"0-0": [float("nan")]}, "profile: key '0-0': scores must be finite"),
        ({"0-0": [True]}, "profile: key '0-0': scores must be finite"),
        ({"0-0": []}, "profile: key '0-0': must be a list of scores"),
        ({"0-0": {}}, "profile: key '0-0': must be a list of scores"),
        ({f"{'9' * 5000}-0": [1]}, "profile: key .* must be '<layer>-<head>'"),
        ({"99999-99999": [1]}, "profile: key '0-0' is missing"),
        ({"٣-0": [1]}, "profile: key .* must be '<layer>-<head>'"),
        ("\0", "profile: .* cannot be read"),
        ("a" * 5000, "profile: a+: cannot be read"),
        ("~nobody-of-this-name/x", "profile: .* cannot be read"),
        ("/dev/zero", r"profile: /dev/zero: cannot be read \(not a file\)"),
        ("/", r"profile: /: cannot be read \(not a file\)"),
    ],
)
def test_profiles_of_any_kind(profile: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Retention.parse({"method": "headkv", "budget": "25%", "profile": profile})


def test_a_profile_that_is_too_deep(tmp_path: Any) -> None:
    file = tmp_path / "deep.json"
    file.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^profile: .*deep.json: is not JSON"):
        HeadProfile.read(str(file))


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("length", [1, 2, 63, 200])
def test_a_wide_kernel_gives_what_a_plain_one_would(pooling: str, length: int) -> None:
    """Also beyond the row, where it costs nothing."""
    torch.manual_seed(0)
    row = torch.rand(3, length)
    plain = torch.max_pool1d if pooling == "max" else torch.avg_pool1d
    for kernel_size in (65, 127, 129, 2 * length + 1, 4001):
        expected = plain(row, kernel_size, stride=1, padding=kernel_size // 2)
        # Sums of up to 400 numbers, added in another order.
        torch.testing.assert_close(pooled(row, kernel_size, pooling), expected, atol=0, rtol=1e-5)
    assert pooled(row, 2**24 - 1, pooling).shape == row.shape


def test_values_are_shown_short() -> None:
    assert shown(12) == "12"
    assert shown(10**60) == "an integer of 200 bits"
    assert shown([10**5000]) == "a list with a huge integer"
    assert len(shown("x" * 1000)) == 80

"""How every preset and each departure from it is spelled, counted and refused, as lines of text.

Labels name results that people keep, the mapping is stored with them, and errors are read by
users: none of them may change unseen. `retention_cases.txt` has a line for each name, with a digest
of what is said for each setting that departs. Where a change is meant:

    PYTHONPATH=tests python tests/support/retention_cases.py
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saqqara.compression.retention import Retention
from saqqara.configs.yaml_files import CONFIG_DIR

STORED = Path(__file__).with_suffix(".txt")
LAYERS, HEADS = 30, 3  # of the model that the shipped profile is of
PROFILE = "SmolLM2-135M-Instruct"
PROMPTS = (1, 36, 100, 999)

COMPOSED = (
    "snapkv-cosine",
    "snapkv-adaptive-cosine",
    "random-pyramid",
    "random-adaptive-pyramid",
    "h2o-pyramid",
    "h2o-profile",
    "knorm-adaptive",
    "streaming-profile",
    "tova-cosine",
    "pyramid",
    "once",
)
DEPARTURES: dict[str, tuple[Any, ...]] = {
    "budget": (64, "12.5%", 36, 0, "0%", 0.25, True, 2**24 + 1, None),
    "score": ("knorm", "h2o", "tova", "best", None),
    "shape": ("uniform", "pyramid", "adaptive", "profile", "cubic"),
    "window": (16, 0, -1, "8", True),
    "sinks": (2, 1.5),
    "skip_layers": ([], [0, 2], [2, 1], [-1], 1),
    "kernel_size": (5, 4, 0),
    "pooling": ("max", "avg", "mean"),
    "beta": (5, 1.5, 0.5, "20"),
    "seed": (7, -1, 2**64),
    "recent_ratio": (0.25, 1, -0.1, "half"),
    "mean": ("uniform", "cosine", "pyramid", "cubic", ["uniform"]),
    "floor_ratio": (0.5, 1.1),
    "profile": (PROFILE, {"0-0": [1.0], "0-1": [2.0]}, 3, "no.json", {"0-0": []}),
    "head_beta": (1.5, 0.9),
    "decode": (
        True,
        False,
        {"slack_pages": 2},
        {"slack_pages": 0},
        {"trigger": "published"},
        {"trigger": "stored", "exceed": 8},
        {"trigger": "never"},
        {"exceed": 1},
        {"pages": 1},
        3,
    ),
    "propagate": (
        None,
        "once",
        "pyramidinfer",
        "twice",
        {"keep": 0.5},
        {"rho": 0.7},
        {"kind": "once", "layer": 2, "window": 16},
        {"layer": 0},
        {"keep": 1},
        {"rho": 0},
        {"min_context": 1},
        {"kernel_size": 4},
        {"pooling": "mean"},
        3,
    ),
    "rho": (0.7, 2),
    "keep": (0.5,),
    "windows": (8,),
}
TOGETHER: tuple[dict[str, Any], ...] = (  # the order in which a label tells them
    {"shape": "pyramid", "beta": 5, "window": 16, "sinks": 2, "skip_layers": [1]},
    {"score": "random", "shape": "pyramid", "seed": 3, "beta": 5, "decode": True},
    {"score": "h2o", "shape": "pyramid", "recent_ratio": 0.25, "beta": 5},
    {"score": "h2o", "shape": "adaptive", "recent_ratio": 0.25, "floor_ratio": 0.5},
    {
        "score": "snapkv",
        "shape": "adaptive",
        "mean": "pyramid",
        "beta": 5,
        "floor_ratio": 0.5,
        "kernel_size": 5,
        "pooling": "avg",
        "propagate": "once",
    },
    {"score": "snapkv", "shape": "profile", "profile": PROFILE, "head_beta": 3, "kernel_size": 3},
)


def names() -> list[str]:
    """Every preset, some composed names, and one that there is not."""
    return [*sorted(file.stem for file in (CONFIG_DIR / "retention").glob("*.yaml")), *COMPOSED]


def cases(name: str) -> dict[str, list[dict[str, Any]]]:
    """Settings as users write them, by what departs from the name's own."""
    own: dict[str, Any] = {"method": name}
    if not name.startswith(("full", "pyramidinfer")):
        own["budget"] = "25%"
    if name in ("headkv", "recommended", "recommended-fast") or name.endswith("profile"):
        own["profile"] = PROFILE  # without it two of them have that of an engine's model
    found = {"bare": [{"method": name}], "itself": [own]}
    for setting, values in DEPARTURES.items():
        found[setting] = [own | {setting: value} for value in values]
    return found | {"together": [own | more for more in TOGETHER]}


def line(given: dict[str, Any]) -> str:
    """What the settings mean: label and a digest of mapping and counts, or what is wrong."""
    spelled = json.dumps(given)
    try:
        retention = Retention.parse(given)
        written = retention.to_dict()
        counts = [_counts(retention, prompt_tokens) for prompt_tokens in PROMPTS]
    except ValueError as error:
        return f"{spelled} ! {error}"
    assert Retention.parse(json.loads(json.dumps(written))) == retention, spelled
    return f"{spelled} = {retention.label} {_digest(json.dumps([written, *counts]))}"


def _counts(retention: Retention, prompt_tokens: int) -> list[Any]:
    return [
        _count(lambda: retention.row_tokens(prompt_tokens, LAYERS, HEADS).tolist()),
        retention.ragged,
        _count(lambda: retention.entering_tokens(prompt_tokens, LAYERS)),
        retention.budget_tokens(prompt_tokens),
        retention.budget_of(prompt_tokens),
        retention.num_window_queries(prompt_tokens),
        retention.recent_tokens(prompt_tokens),
    ]


def _count(count: Callable[[], Any]) -> Any:
    try:
        return count()
    except ValueError as error:
        return str(error)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def lines(name: str, setting: str) -> list[str]:
    """What is said of a name with each value of a setting that departs."""
    return [line(given) for given in cases(name)[setting]]


def digests(name: str) -> dict[str, str]:
    """A digest of `lines` for each setting."""
    return {setting: _digest("\n".join(lines(name, setting))) for setting in cases(name)}


def stored_digests() -> dict[str, dict[str, str]]:
    """What `retention_cases.txt` has, by name and setting."""
    words = [row.split() for row in STORED.read_text(encoding="utf-8").splitlines()]
    return {name: dict(pair.split("=") for pair in pairs) for name, *pairs in words}


def stored_text() -> str:
    """What `retention_cases.txt` should have."""
    rows = ([name, *(f"{k}={v}" for k, v in digests(name).items())] for name in names())
    return "".join(f"{' '.join(row)}\n" for row in rows)


if __name__ == "__main__":
    text = stored_text()  # before the file is opened: a failure leaves it as it was
    STORED.write_text(text, encoding="utf-8")

"""Each alert is shown to fire and not to fire by unit tests of promtool, and these can fail."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.prometheus import find_binary

from saqqara.cluster.live.families import METRICS

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "prometheus"
RULES: dict[str, Any] = yaml.safe_load((FOLDER / "rules.yaml").read_text())
TESTS: dict[str, Any] = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())
ALERTS = [rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
RECORDED = [
    rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule
]
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
EXPORTED = {spec.name + suffix for spec in METRICS for suffix in SUFFIXES[spec.kind]}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [find_binary("promtool"), *arguments], capture_output=True, text=True, check=False
    )


def colon_names(text: str) -> set[str]:
    """Names of metrics and of recorded series in an expression; both have a colon."""
    return set(re.findall(r"\b[a-z_]+:[a-z0-9_]+(?::[a-z0-9_]+)?", text))


def test_promtool_finds_nothing_wrong() -> None:
    for arguments in (
        ("check", "config", str(FOLDER / "prometheus.yaml")),
        ("check", "rules", str(FOLDER / "rules.yaml")),
        ("test", "rules", str(FOLDER / "rules_test.yaml")),
    ):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases: dict[str, set[bool]] = {alert: set() for alert in ALERTS}
    for test in TESTS["tests"]:
        for case in test["alert_rule_test"]:
            cases[case["alertname"]].add(bool(case.get("exp_alerts")))
    assert cases == {alert: {True, False} for alert in ALERTS}


@pytest.mark.parametrize("expression", ["vector(1) < 0", "vector(1)"], ids=["never", "always"])
def test_alerts_that_fire_never_or_always_fail_their_tests(expression: str, tmp_path: Path) -> None:
    rules = yaml.safe_load((FOLDER / "rules.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = expression
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(FOLDER / "rules_test.yaml", tmp_path)
    done = promtool("test", "rules", str(tmp_path / "rules_test.yaml"))
    assert done.returncode != 0
    for alert in ALERTS:
        assert re.search(rf"alertname: ?{alert}\b", done.stdout + done.stderr), alert


def test_rules_read_what_the_engine_exports_or_another_rule_records() -> None:
    assert len(set(RECORDED)) == len(RECORDED)
    known = EXPORTED | set(RECORDED)
    for group in RULES["groups"]:
        for rule in group["rules"]:
            assert colon_names(rule["expr"]) <= known, rule
            assert rule["expr"].startswith("up{") or colon_names(rule["expr"])
    for test in TESTS["tests"]:
        for series in test["input_series"]:
            assert colon_names(series["series"].partition("{")[0]) <= EXPORTED


def test_every_alert_is_in_the_operators_table() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert re.findall(r"^\| `(Saqqara\w+)` \|", text, re.M) == ALERTS

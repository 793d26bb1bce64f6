"""Workloads and agreement: what a measurement is about, before any engine runs."""

import json
from pathlib import Path

import pytest
from support.tiny import CONFIGS

from saqqara.cluster.batch.compare import common_prefix_share, compare_answers, compare_results
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.prompts.corpus import pydoc_text, windows
from saqqara.evaluation.speed.throughput import Workload


def test_agreement_counts_equal_answers_and_common_beginnings() -> None:
    agreement = compare_answers([[1, 2, 3, 4], [5], []], [[1, 2, 9], [5], []])
    assert (agreement.answers, agreement.identical) == (3, 2)
    assert agreement.identical_share == pytest.approx(2 / 3)
    assert agreement.common_prefix_share == pytest.approx((0.5 + 1 + 1) / 3)
    assert common_prefix_share([1], [2]) == 0.0
    assert compare_answers([], []).identical_share == 0.0
    with pytest.raises(ValueError, match="equal"):
        compare_answers([[1]], [])


def test_results_are_compared_line_by_line(tmp_path: Path) -> None:
    body = {"choices": [{"token_ids": [3, 4]}]}
    ours = [
        {"line": 2, "error": None, "response": {"body": body}},
        {"line": 1, "error": None, "token_ids": [1, 2]},
        {"line": 3, "error": {"message": "bad"}},
    ]
    theirs = [
        {"line": 1, "error": None, "token_ids": [1, 2]},
        {"line": 2, "error": None, "token_ids": [3, 5]},
        {"line": 3, "error": None, "token_ids": [7]},
    ]
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    a.write_text("\n".join(map(json.dumps, ours)))
    b.write_text("\n".join(map(json.dumps, theirs)))
    agreement = compare_results(a, b)
    assert (agreement.answers, agreement.identical) == (2, 1)
    assert agreement.common_prefix_share == pytest.approx(0.75)
    c.write_text(json.dumps({"line": 1, "error": None}))
    with pytest.raises(ValueError, match="--return-token-ids"):
        compare_results(a, c)
    c.write_text(json.dumps({"line": 9, "error": None, "token_ids": []}))
    with pytest.raises(ValueError, match="in common"):
        compare_results(a, c)


def test_windows_are_different_and_spread_over_the_text() -> None:
    tokens = list(range(1000))
    found = windows(tokens, 4, 100)
    assert [len(window) for window in found] == [100] * 4
    assert [window[0] for window in found] == [0, 225, 450, 675]
    with pytest.raises(ValueError, match="no 500 different windows"):
        windows(tokens, 500, 900)
    assert len(pydoc_text()) > 300_000


def test_made_up_prompts_are_seeded(tmp_path: Path) -> None:
    CONFIGS["llama-gqa"].save_pretrained(tmp_path)
    config = EngineConfig(model=str(tmp_path), seed=1)
    workload = Workload(num_requests=3, prompt_tokens=5)
    prompts = workload.token_ids(config)
    assert [len(prompt) for prompt in prompts] == [5, 5, 5]
    assert prompts == workload.token_ids(config)
    assert prompts != workload.token_ids(config.model_copy(update={"seed": 2}))
    assert all(0 <= token < 199 for prompt in prompts for token in prompt)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("{}", "list of lists"),
        ("[]", "list of lists"),
        ("[[1], [2, true]]", "entry 1 must be"),
        ("[[]]", "entry 0 must be"),
    ],
)
def test_a_wrong_prompt_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        Workload(prompts=file).token_ids(EngineConfig(model="m"))
    with pytest.raises(ValueError, match="cannot read"):
        Workload(prompts=tmp_path / "none.json").token_ids(EngineConfig(model="m"))


def test_prompts_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text("[[1, 2], [3]]")
    assert Workload(prompts=file).token_ids(EngineConfig(model="m")) == [[1, 2], [3]]

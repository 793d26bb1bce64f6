"""Tasks of lm-evaluation-harness on the real model, where the harness is installed.

Three small tasks of our own (`support/lm_eval_tasks/`), one for each question that the harness asks
a model. What it reports for `full` must be what transformers' logits say.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

lm_eval = pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")
datasets = pytest.importorskip("datasets")  # which the harness reads its tasks with

pytestmark = pytest.mark.filterwarnings("default")  # the harness and what it loads have their own
TASKS = Path(__file__).resolve().parents[2] / "support" / "lm_eval_tasks"


def task(name: str) -> dict[str, Any]:
    """A task with the path of its data."""
    config: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    config["dataset_kwargs"] = {"data_files": {"test": str(TASKS / f"{name}.jsonl")}}
    return config


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluate(
    demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The harness's results and samples under a retention."""
    import saqqara.evaluation.lm_eval  # noqa: F401 - registers the model

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")

    def run(retention: str) -> dict[str, Any]:
        settings = f"model={demo_model},dtype=float32,device=cpu,max_model_len=512,{retention}"
        tasks = [task(name) for name in ("choice", "rolling", "generate")]
        found: dict[str, Any] = lm_eval.simple_evaluate(
            "saqqara", settings, tasks=tasks, bootstrap_iters=0
        )
        return found

    return run


@pytest.fixture(scope="module")
def full(evaluate: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return evaluate("retention=full")


@torch.inference_mode()
def logprob(model: Any, tokens: list[int], last: int) -> float:
    """Of the last so many tokens, given those before."""
    table = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(table[i - 1, tokens[i]]) for i in range(len(tokens) - last, len(tokens)))


def test_full_says_what_transformers_says(full: dict[str, Any], demo_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    samples = full["samples"]["saqqara_choice"]
    assert len(samples) == len(lines("choice"))
    for sample in samples[:2]:
        for request, [(ours, _)] in zip(sample["arguments"], sample["resps"], strict=True):
            context, choice = request
            assert context.count("Question:") == 6  # five are shots
            tokens = tokenizer.encode(context + choice)
            expected = logprob(model, tokens, len(tokens) - len(tokenizer.encode(context)))
            assert ours == pytest.approx(expected, abs=1e-3)  # fp32, sums of a few tokens
    total = words = 0.0
    for line in lines("rolling"):
        tokens = tokenizer.encode(line["text"])
        total += logprob(model, [tokenizer.bos_token_id, *tokens], len(tokens))
        words += len(line["text"].split())
    perplexity = full["results"]["saqqara_rolling"]["word_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-total / words), rel=1e-3)
    assert full["results"]["saqqara_generate"]["exact_match,none"] == 1.0


def test_retention_acts_on_contexts_and_not_on_rolling_text(
    full: dict[str, Any], evaluate: Callable[[str], dict[str, Any]]
) -> None:
    cut = evaluate("retention=snapkv,budget=48")

    def answers(found: dict[str, Any], name: str) -> list[Any]:
        return [sample["resps"] for sample in found["samples"][name]]

    assert answers(cut, "saqqara_choice") != answers(full, "saqqara_choice")
    assert cut["results"]["saqqara_choice"]["acc,none"] >= 0.25
    assert cut["results"]["saqqara_rolling"] == full["results"]["saqqara_rolling"]
    # One continuation of a long count must survive a third of its keys.
    assert cut["results"]["saqqara_generate"]["exact_match,none"] >= 0.5

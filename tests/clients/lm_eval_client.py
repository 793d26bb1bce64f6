"""lm-evaluation-harness over HTTP; what it is told must be what transformers' logits say."""

import json
import os
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from checks import API_KEY, BASE_URL, MODEL, run
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = os.environ["SAQQARA_CLIENT_FOLDER"]
TASKS = Path(os.environ["SAQQARA_CLIENT_TASKS"])
TOLERANCE = 0.02  # fp32 on both sides; sums of a few tokens, rounded differently
os.environ["OPENAI_API_KEY"] = API_KEY


def task(name: str) -> dict[str, Any]:
    """A task with the path of its data."""
    config: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    config["dataset_kwargs"] = {"data_files": {"test": str(TASKS / f"{name}.jsonl")}}
    return config


def evaluate(kind: str, path: str, *names: str, **more: Any) -> dict[str, Any]:
    """Results and samples of tasks."""
    settings = f"model={MODEL},base_url={BASE_URL}{path},num_concurrent=2,max_retries=1"
    if kind == "local-completions":
        settings += f",tokenizer={FOLDER},tokenizer_backend=huggingface,max_length=2048"
    found: dict[str, Any] = lm_eval.simple_evaluate(
        kind, settings, tasks=[task(name) for name in names], bootstrap_iters=0, **more
    )
    return found


@torch.inference_mode()
def logprob(model: Any, tokens: list[int], last: int) -> float:
    """Of the last so many tokens, given those before."""
    table = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(table[i - 1, tokens[i]]) for i in range(len(tokens) - last, len(tokens)))


def local_completions_says_what_transformers_says() -> None:
    found = evaluate("local-completions", "/v1/completions", "choice", "rolling")
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    samples = found["samples"]["saqqara_choice"]
    assert len(samples) == len((TASKS / "choice.jsonl").read_text().splitlines())
    for sample in samples[:2]:
        for request, [(ours, _)] in zip(sample["arguments"], sample["resps"], strict=True):
            context, choice = request
            tokens = tokenizer.encode(context + choice)
            expected = logprob(model, tokens, len(tokens) - len(tokenizer.encode(context)))
            assert abs(ours - expected) < TOLERANCE, (ours, expected)
    assert found["results"]["saqqara_rolling"]["word_perplexity,none"] > 1


def local_completions_generates() -> None:
    found = evaluate("local-completions", "/v1/completions", "generate")
    assert found["results"]["saqqara_generate"]["exact_match,none"] == 1.0


def local_chat_completions_generates() -> None:
    found = evaluate(
        "local-chat-completions", "/v1/chat/completions", "generate", apply_chat_template=True
    )
    samples = found["samples"]["saqqara_generate"]
    assert len(samples) == len((TASKS / "generate.jsonl").read_text().splitlines())
    assert all(sample["resps"][0][0] for sample in samples), json.dumps(samples[0]["resps"])


if __name__ == "__main__":
    run(
        local_completions_says_what_transformers_says,
        local_completions_generates,
        local_chat_completions_generates,
    )

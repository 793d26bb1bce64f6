"""Saqqara itself, through its Python front door, under the same protocol as its peers."""

import json
import time
from typing import Any

from protocol import Answers, Prompts, parser, serve

from saqqara import LLM, SamplingParams
from saqqara.workers.models.spec import load_spec


class Saqqara:
    """`LLM` with the LocalExecutor, in this process."""

    def __init__(
        self, model: str, threads: int, settings: dict[str, Any], kv_tokens: int | None
    ) -> None:
        common: dict[str, Any] = {"model": model, "num_threads": threads, "dtype": "bfloat16"}
        common["prefix_caching"] = False
        if kv_tokens is not None:
            settings = {"kv_memory_gib": kv_tokens * token_bytes(model) / 2**30} | settings
        self.llm = LLM(**common | settings)
        self.settings = settings

    def prepare(self, prompts: Prompts, new_tokens: int) -> None:
        """Nothing depends on the lengths."""

    def generate(self, prompts: Prompts, new_tokens: int) -> Answers:
        """One call of `LLM.generate`."""
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        before = self.llm.report().num_preemptions
        start = time.time()
        outputs = self.llm.generate(prompt_token_ids=prompts, sampling_params=sampling)
        firsts = [(output.metrics.first_token_time or start) - start for output in outputs]
        return Answers(
            [list(output.outputs[0].token_ids) for output in outputs],
            max(firsts),
            self.llm.report().num_preemptions - before,
            firsts,
            sum(output.num_cached_tokens or 0 for output in outputs),
        )


def token_bytes(model: str) -> int:
    """Bytes of the keys and values of one token, in bfloat16, in full."""
    spec = load_spec(model)
    numbers = spec.num_layers * spec.num_kv_heads * spec.head_dim
    return 2 * numbers * 2  # key + value, bytes of a number


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--settings", type=json.loads, default={}, help="of LLM, as JSON")
    options.add_argument("--kv-tokens", type=int, help="room for the full KV of so many tokens")
    given = options.parse_args()
    serve(
        lambda: Saqqara(given.model, given.threads, given.settings, given.kv_tokens),
        ["saqqara", "torch"],
    )

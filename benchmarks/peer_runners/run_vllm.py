"""vLLM on CPU: its offline `LLM`, engine and worker in processes of their own as by default."""

import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from protocol import Answers, Prompts, parser, serve

BLOCK_TOKENS = 32  # of a room that is given in tokens; its attention on CPU takes multiples
KV_CACHE_GIB = 3  # twice what W3, the largest workload, needs; vLLM takes it all at once


def room_of(model: str, kv_tokens: int) -> dict[str, int]:
    """Arguments of `LLM` for room of so many tokens.

    One block of vLLM's holds nothing, so it gets one more. It does not start when the longest
    sequence that it might be given does not fit.
    """
    config = json.loads((Path(model) / "config.json").read_text())
    return {
        "block_size": BLOCK_TOKENS,
        "num_gpu_blocks_override": kv_tokens // BLOCK_TOKENS + 1,
        "max_model_len": min(kv_tokens, config["max_position_embeddings"]),
    }


class Vllm:
    """Defaults for batch limits and compilation; no detokenisation."""

    def __init__(self, given: Namespace) -> None:
        cores = sorted(os.sched_getaffinity(0))[: given.threads]
        self.settings: dict[str, Any] = {
            "VLLM_CPU_KVCACHE_SPACE": str(given.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # auto leaves a core unused
            "VLLM_CACHE_ROOT": os.path.join(given.cache, "vllm"),
        }
        library = Path(sys.prefix) / "lib" / "libiomp5.so"
        if given.openmp == "intel" and library.exists():
            self.settings["LD_PRELOAD"] = str(library)  # as its manual recommends
        os.environ.update(self.settings)  # all of them strings so far
        os.environ.pop("OMP_NUM_THREADS", None)  # follows from the binding
        os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        from vllm import LLM

        room = {} if given.kv_tokens is None else room_of(given.model, given.kv_tokens)
        self.settings |= room
        self.llm = LLM(
            given.model,
            dtype="bfloat16",
            enable_prefix_caching=given.prefix_caching == "on",
            **room,
            disable_log_stats=False,  # times of first tokens come with them
        )
        scheduler = self.llm.llm_engine.vllm_config.scheduler_config
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            self.settings[name] = getattr(scheduler, name)

    def prepare(self, prompts: Prompts, new_tokens: int) -> None:
        """Nothing depends on the lengths."""

    def generate(self, prompts: Prompts, new_tokens: int) -> Answers:
        """One call of `LLM.generate`."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        before = self._num_preemptions()
        start = time.time()
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False
        )
        metrics = [output.metrics for output in outputs]
        firsts = [one.arrival_time + one.first_token_latency - start for one in metrics]
        return Answers(
            [list(output.outputs[0].token_ids) for output in outputs],
            max(firsts),
            self._num_preemptions() - before,
            firsts,
            sum(output.num_cached_tokens or 0 for output in outputs),
        )

    def _num_preemptions(self) -> int:
        return sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--openmp", choices=("intel", "gnu"), default="intel")
    options.add_argument("--kv-cache-gib", type=int, default=KV_CACHE_GIB, help="resident at once")
    options.add_argument("--prefix-caching", choices=("on", "off"), default="off")
    options.add_argument("--kv-tokens", type=int, help="room for so many tokens of it")
    given = options.parse_args()
    serve(lambda: Vllm(given), ["vllm-cpu", "torch"])

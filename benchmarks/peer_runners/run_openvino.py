"""OpenVINO GenAI: its continuous batching pipeline, in bf16, optionally with its cache eviction."""

import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from protocol import Answers, Clock, Prompts, parser, serve

BLOCK_TOKENS = 32
START_TOKENS = 32  # of the beginning, which eviction never takes
RECENT_TOKENS = 128  # at most; less where that would be most of the budget


def converted(model: str, cache: str) -> Path:
    """Folder of the model as OpenVINO IR, which is made with optimum-intel on first use."""
    source = Path(model).resolve()
    key = sha256(str(source).encode()).hexdigest()[:8]
    target = Path(cache) / f"{source.name}-{key}"
    if not target.exists():
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        program = Path(sys.executable).with_name("optimum-cli")
        command = [str(program), "export", "openvino", "--model", str(source)]
        command += ["--task", "text-generation-with-past", str(temporary)]
        try:
            subprocess.run(command, check=True, stdout=sys.stderr)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


class OpenVino:
    """A pipeline; with eviction it is made anew for another length of prompts."""

    def __init__(self, given: Any) -> None:
        self.folder = converted(given.model, given.cache)
        self.kept_share: float | None = given.kept_share
        self.properties = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": given.kv_precision,
            "INFERENCE_NUM_THREADS": given.threads,
        }
        self.cache_gb: int = given.cache_gb
        self.kv_tokens: int | None = given.kv_tokens
        self.batched_tokens: int | None = given.max_num_batched_tokens
        self.settings: dict[str, Any] = dict(self.properties)
        self.prompt_tokens = 0
        self.pipeline: Any = None
        if self.kept_share is None:
            self.load(None)

    def load(self, eviction: Any) -> None:
        """Make the pipeline."""
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        if self.kv_tokens is None:
            scheduler.cache_size = self.cache_gb
        else:  # the size is in whole GB
            scheduler.cache_size, scheduler.num_kv_blocks = 0, self.kv_tokens // BLOCK_TOKENS
        scheduler.enable_prefix_caching = False
        if self.batched_tokens is not None:
            scheduler.max_num_batched_tokens = self.batched_tokens
        if eviction is not None:
            scheduler.use_cache_eviction = True
            scheduler.cache_eviction_config = eviction
        self.pipeline = None  # release the old one first
        self.pipeline = genai.ContinuousBatchingPipeline(
            str(self.folder), scheduler, "CPU", self.properties
        )
        for name in ("cache_size", "num_kv_blocks", "max_num_batched_tokens", "max_num_seqs"):
            self.settings[name] = getattr(scheduler, name)

    def prepare(self, prompts: Prompts, new_tokens: int) -> None:
        """The size of its cache is a setting of the pipeline, in tokens."""
        import openvino_genai as genai

        longest = max(map(len, prompts))
        if self.kept_share is None or longest == self.prompt_tokens:
            return
        kept = int(self.kept_share * longest) // BLOCK_TOKENS * BLOCK_TOKENS
        recent = min(RECENT_TOKENS, (kept - START_TOKENS) // 2 // BLOCK_TOKENS * BLOCK_TOKENS)
        if recent < BLOCK_TOKENS:
            raise ValueError(f"{longest} prompt tokens are too few to evict from")
        self.load(
            genai.CacheEvictionConfig(START_TOKENS, recent, kept, genai.AggregationMode.NORM_SUM)
        )
        self.prompt_tokens = longest
        self.generate([prompts[0]], 2)  # warm up what is new

    def generate(self, prompts: Prompts, new_tokens: int) -> Answers:
        """Add all requests and step until none is left."""
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        config = genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        clock = Clock(len(prompts))
        handles = [
            self.pipeline.add_request(i, ov.Tensor(np.array([prompt], dtype=np.int64)), config)
            for i, prompt in enumerate(prompts)
        ]
        waiting = handles
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            still = [handle for handle in waiting if not handle.can_read()]
            for _ in range(len(waiting) - len(still)):
                clock.first_token()
            waiting = still
        answers = [list(handle.read_all()[0].generated_ids) for handle in handles]
        return Answers(answers, clock.last_first_token)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--kept-share", type=float, help="evict to this share of the prompt")
    options.add_argument("--kv-precision", default="bf16", help="bf16, or u8 (its default)")
    options.add_argument("--cache-gb", type=int, default=2, help="most memory for keys and values")
    options.add_argument("--kv-tokens", type=int, help="room for so many, instead of --cache-gb")
    options.add_argument("--max-num-batched-tokens", type=int, help="default: its own")
    given = options.parse_args()
    serve(lambda: OpenVino(given), ["openvino-genai", "openvino"])

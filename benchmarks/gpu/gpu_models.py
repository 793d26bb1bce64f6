"""Random models of real shapes on one device, for `gpu_check.py`: no file but a config is read."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_report import GIB, Bench
from transformers import LlamaConfig

from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers.worker import Worker

_SLACK_BYTES = 3 * GIB // 2  # graphs, libraries' workspaces, fragments
_PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model."""

    name: str
    hidden: int
    inner: int
    num_layers: int
    num_queries: int
    num_heads: int
    vocab: int
    dim: int = 128

    def config(self, max_position: int) -> Any:
        """As transformers writes it; nothing ends a text."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_queries,
            num_key_value_heads=self.num_heads,
            head_dim=self.dim,
            max_position_embeddings=max_position,
            tie_word_embeddings=False,
            eos_token_id=None,
            architectures=["LlamaForCausalLM"],
        )

    def kv_token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_heads * self.dim * dtype.itemsize


LLAMA_2_13B = Shape("Llama-2-13B", 5120, 13824, 40, 40, 40, 32000)
LLAMA_3_8B = Shape("Llama-3-8B", 4096, 14336, 32, 32, 8, 128256)
LLAMA_3_8B_QUARTER = replace(LLAMA_3_8B, name="a quarter of Llama-3-8B's layers", num_layers=8)
LLAMA_3_70B_RANK = Shape("one rank of Llama-3-70B, TP=8", 8192, 3584, 80, 8, 1, 16032)


def small(shape: Shape, num_layers: int) -> Shape:
    """A model of the same heads, that is made at once: kernels are those of its attention."""
    least = min(512, shape.hidden)
    return replace(
        shape, hidden=least, inner=least, num_layers=num_layers, vocab=min(512, shape.vocab)
    )


@dataclass(frozen=True)
class Load:
    """A batch of prompts of one length, and how many tokens follow each."""

    prompt_tokens: int
    new_tokens: int
    batch: int

    @property
    def tokens(self) -> int:
        """The longest a sequence gets."""
        return self.prompt_tokens + self.new_tokens

    def prompts(self, vocab: int, batch: int | None = None) -> list[tuple[int, ...]]:
        """Random token ids, different in every prompt; `batch` overrides the load's own."""
        random = torch.Generator().manual_seed(0)
        size = (self.batch if batch is None else batch, self.prompt_tokens)
        ids = torch.randint(0, vocab, size, generator=random)
        return [tuple(row) for row in ids.tolist()]


def settings_of(bench: Bench, folder: Path, load: Load, max_num_seqs: int) -> WorkerSettings:
    """Of a worker whose pool takes what the cap leaves."""
    settings = WorkerSettings(
        model=str(folder),
        load_format="dummy",
        dtype=bench.dtype_name,
        device=bench.device.type,
        max_model_len=load.tokens,
        max_num_seqs=max_num_seqs,
        max_prefill_tokens=max(_PREFILL_TOKENS, load.prompt_tokens),
        attention_backend=bench.attention_backend,
    )
    if bench.device.type != "cuda":
        return replace(settings, kv_memory_gib=bench.pool_gib, max_prefill_tokens=load.tokens)
    _, total = torch.cuda.mem_get_info(bench.device)
    share = (min(bench.cap_bytes, total) - _SLACK_BYTES) / total
    return replace(settings, memory_utilization=share)


@contextmanager
def random_worker(
    bench: Bench, shape: Shape, load: Load, max_num_seqs: int, **changes: Any
) -> Iterator[tuple[Worker, WorkerSettings]]:
    """A worker with random weights of a shape, and its settings; `changes` are to these."""
    with tempfile.TemporaryDirectory() as folder:
        shape.config(load.tokens).save_pretrained(folder)
        settings = replace(settings_of(bench, Path(folder), load, max_num_seqs), **changes)
        worker = Worker.local(settings)
    gib = worker.info.memory.weight_bytes / GIB
    pool = worker.info.num_pages * worker.info.page_bytes / GIB
    bench.say(f"{shape.name}: {gib:.2f} GiB of weights, {pool:.2f} GiB of pages")
    try:
        yield worker, settings
    finally:
        worker.close()


@contextmanager
def memory_cap(bench: Bench) -> Iterator[None]:
    """Nothing inside takes more of a GPU's memory than the cap."""
    if bench.device.type != "cuda":
        yield
        return
    _, total = torch.cuda.mem_get_info(bench.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, bench.cap_bytes / total), bench.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)

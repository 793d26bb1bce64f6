"""What one worker needs to know of the engine's settings: plain values, checked before."""

from dataclasses import dataclass
from typing import Any

from .step_limits import ON_CPU

MAX_NUM_SEQS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Settings of one worker; names, defaults and meaning are those of `EngineConfig`.

    Users write an `EngineConfig`, which checks every value; `EngineConfig.for_worker` makes this of
    it. A worker that is used by itself needs neither that class nor the package it is made with.

    `left_open` names those of `step_limits.OPEN` that the worker's device decides.
    """

    model: str
    tokenizer: str | None = None
    load_format: str = "safetensors"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = ON_CPU.max_num_seqs
    max_prefill_tokens: int = ON_CPU.max_prefill_tokens
    linear_chunk_tokens: int = 2048
    page_tokens: int = 16
    kv_memory_gib: float | None = None
    host_kv_gib: float | None = None
    memory_utilization: float = 0.9
    retention: str | dict[str, Any] = "full"
    budget: int | str | None = None
    attention_backend: str = "auto"
    linear_backend: str = "auto"
    cuda_graphs: str = "auto"
    layer_split: tuple[int, ...] | None = None
    num_threads: int | None = None
    warmup: bool = True
    left_open: tuple[str, ...] = ()

"""A snapshot of one engine: what it does now, what it keeps of KV, and how its ranks are.

`GET /stats` answers with a `LiveStats`. The engine's thread publishes it a few times a second, and
whoever asks gets the latest: reading takes no lock and asks the engine nothing.
"""

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class ReplicaName(_Frozen):
    """Which of several replicas has answered."""

    id: str = Field(description="Its name, the same as long as it lives.")
    hostname: str
    pid: int
    started: float = Field(description="Unix time in seconds.")


class QueueState(_Frozen):
    """Sequences now, and requests that have ended."""

    running: int = Field(description="Sequences in prefill or decode.")
    waiting: int = Field(description="Sequences without a slot.")
    finished: dict[str, int] = Field(description="Requests that have ended, by reason.")
    preemptions: int = Field(description="Times that a sequence lost its slot for a while.")


class Throughput(_Frozen):
    """Tokens per second over the last `window_seconds`, and in all."""

    prompt_tokens_per_second: float
    generation_tokens_per_second: float
    window_seconds: float
    prompt_tokens: int = Field(description="Prefilled since the start, each request once.")
    generation_tokens: int = Field(description="Generated since the start.")


class KvState(_Frozen):
    """Pages of all ranks, and what sequences hold of them against what `full` would hold.

    Tokens are those of the context: `full_tokens` is the length of all sequences together, and
    `kept_tokens` the mean over layers and kv heads of what is kept of it. Layers with
    sliding-window attention are none of them; what these hold are the local bytes.
    """

    page_tokens: int
    num_pages: int
    pages_free: int
    usage: float = Field(
        description="Share of pages that sequences need, of the rank with the least free."
    )
    kept_tokens: float
    full_tokens: int
    kept_bytes: int
    full_bytes: int
    kept_bytes_peak: int
    full_bytes_peak: int
    local_bytes: int = 0
    local_bytes_peak: int = 0


class PrefixState(_Frozen):
    """Cached prefixes of prompts; tokens and blocks are counted since the start."""

    query_tokens: int = Field(0, description="Prompt tokens of sequences that started.")
    hit_tokens: int = Field(0, description="Those of them that were not computed for it.")
    num_blocks: int = Field(0, description="Blocks that have pages now.")
    num_bytes: int = Field(0, description="Bytes of these pages, on all ranks.")
    blocks_stored: int = 0
    blocks_evicted: int = 0


class PyramidState(_Frozen):
    """What one sequence keeps in each layer: the mean over sequences and kv heads.

    Where nothing runs it is that of the last that ran, with `is_live` false.
    """

    is_live: bool
    num_sequences: int = Field(description="Sequences that the means are over.")
    kept_tokens: list[float] = Field(description="By layer, the lowest first.")
    full_tokens: float = Field(description="What each layer would hold under full retention.")
    windows: list[int] = Field(
        [],
        description="By layer, the window of sliding-window attention, which is all that it holds; "
        "0: none. Empty where no layer has one.",
    )


class RankState(_Frozen):
    """One rank: its part of the model, its pages, and the seconds that its steps took."""

    rank: int
    pipeline_rank: int
    tensor_rank: int
    hostname: str
    device: str
    layers: tuple[int, int] = Field(description="First, and the one after the last.")
    kv_heads: tuple[int, int] = Field(description="First, and the one after the last.")
    is_alive: bool
    num_pages: int
    pages_free: int
    resident_bytes: int
    seconds: dict[str, float] = Field(description="By phase of the step, since the start.")
    times_lost: int = Field(description="How often it was the rank that ended the others' work.")


class RecoveryState(_Frozen):
    """How often lost ranks were started again, and what that took."""

    by_cause: dict[str, int]
    down_seconds: float


class LiveStats(_Frozen):
    """What `GET /stats` answers. Times are Unix seconds."""

    model: str
    retention: str = Field(description="Of requests that do not say.")
    replica: ReplicaName
    time: float = Field(description="When the engine published this.")
    is_ready: bool = Field(description="False while lost ranks are started again.")
    queue: QueueState
    throughput: Throughput
    kv_cache: KvState
    prefixes: PrefixState = PrefixState()
    pyramid: PyramidState
    ranks: list[RankState]
    recoveries: RecoveryState

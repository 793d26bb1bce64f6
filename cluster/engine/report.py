"""What a run did and what it took: the numbers behind every claim about memory and speed."""

import math
from collections import Counter
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from saqqara.workers.plan import WorkerInfo, WorkerMemory

_BUCKET = 1.01  # durations are told apart to one percent


class Latency(BaseModel):
    """Distribution of a duration, in seconds; zeros when nothing was measured."""

    model_config = ConfigDict(frozen=True)

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p99: float = 0.0


class LatencyRecorder:
    """Collects durations in buckets of one percent, so memory stays small however long it runs."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Take in one duration."""
        self._buckets[round(math.log(max(seconds, 1e-9), _BUCKET))] += 1
        self._sum += seconds

    def summary(self) -> Latency:
        """Count, mean and quantiles so far."""
        count = self._buckets.total()
        if count == 0:
            return Latency()
        return Latency(
            count=count, mean=self._sum / count, p50=self._quantile(0.5), p99=self._quantile(0.99)
        )

    def _quantile(self, share: float) -> float:
        left = share * self._buckets.total()
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                break
        return float(_BUCKET**bucket)


@dataclass(frozen=True, slots=True)
class BatchRows:
    """How far a batch job is, for the metrics.

    Attributes:
        num_rows: rows of the input.
        num_left: rows that have no record yet.
        num_answered, num_errors: records written since the last time this was told.
    """

    num_rows: int
    num_left: int
    num_answered: int
    num_errors: int


class WorkerReport(BaseModel):
    """One worker: its place, its pool and its bytes (peaks since start-up)."""

    model_config = ConfigDict(frozen=True)

    rank: int
    pipeline_rank: int
    tensor_rank: int
    hostname: str
    device: str
    dtype: str
    attention_backend: str
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    num_pages: int
    pages_free: int
    page_tokens: int
    page_bytes: int
    memory: WorkerMemory

    @classmethod
    def of(cls, worker: WorkerInfo, pages_free: int, memory: WorkerMemory) -> "WorkerReport":
        """What is known of a worker now."""
        return cls(
            rank=worker.rank,
            pipeline_rank=worker.pipeline_rank,
            tensor_rank=worker.tensor_rank,
            hostname=worker.hostname,
            device=worker.device,
            dtype=worker.dtype,
            attention_backend=worker.attention_backend,
            layers=(worker.start_layer, worker.stop_layer),
            kv_heads=(worker.start_head, worker.stop_head),
            num_pages=worker.num_pages,
            pages_free=pages_free,
            page_tokens=worker.page_tokens,
            page_bytes=worker.page_bytes,
            memory=memory,
        )


class EngineReport(BaseModel):
    """Measurements of one engine since its start or its last `reset_stats`.

    Attributes:
        requests: finished requests by reason (`stop`, `length`, `abort`, `error`).
        num_running_peak: most sequences that had a slot at one moment.
        recoveries: how often lost workers were started again, by how they were lost (`died`,
            `failed`, `hung`, `unreachable`).
        down_seconds: without workers, in those outages together.
        wall_seconds: from the first request to the last output.
        prefill_seconds, decode_seconds: summed over steps, the slowest worker of each step.
        phase_seconds: the same for every phase that workers report.
        prefix_query_tokens, prefix_hit_tokens: prompt tokens of sequences that started, and those
            of them that were not computed for it: cached ones, and those of a prefill that several
            sequences share.
        prefix_blocks_stored, prefix_blocks_evicted: blocks of cached prefixes.
        prefix_bytes: of the pages that blocks have now, on all workers.
        kv_kept_bytes_peak: most bytes of pages that sequences held at one moment, on all workers;
            pages of blocks that several of them hold count for each.
        kv_full_bytes_peak: what full retention would have held at that same moment.
        kv_local_bytes_peak: what layers with sliding-window attention held then, whatever the
            retention; the two above are of the other layers.
        kv_ring_bytes_peak: most bytes of queries (and, for PyramidInfer's published stage, their
            normalisers) that sequences remembered at one moment to cut by while decoding. They lie
            beside the pages and are no part of `kv_kept_bytes_peak`.
        kept_tokens_by_layer, dropped_tokens_by_layer: over all prefills, summed over kv heads. A
            layer with sliding-window attention keeps its window and drops nothing.
        pages_leaked: pages that are not free although no sequence is left, and nothing is kept in
            them for later ones; None while busy.
        prefill_kv_bytes_peak, prefill_activation_bytes_peak, resident_bytes_peak: since start-up,
            summed over workers.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    retention: str
    requests: dict[str, int]
    prompt_tokens: int
    generation_tokens: int
    scored_tokens: int
    num_steps: int
    num_preemptions: int
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_blocks_stored: int = 0
    prefix_blocks_evicted: int = 0
    prefix_bytes: int = 0
    num_running_peak: int
    recoveries: dict[str, int] = {}
    down_seconds: float = 0.0
    wall_seconds: float
    prefill_seconds: float
    decode_seconds: float
    phase_seconds: dict[str, float]
    prompt_tokens_per_second: float
    generation_tokens_per_second: float
    time_to_first_token: Latency
    inter_token_latency: Latency
    e2e_latency: Latency
    kv_kept_bytes_peak: int
    kv_full_bytes_peak: int
    kv_local_bytes_peak: int = 0
    kv_ring_bytes_peak: int
    kept_tokens_by_layer: tuple[int, ...]
    dropped_tokens_by_layer: tuple[int, ...]
    pages_leaked: int | None
    prefill_kv_bytes_peak: int
    prefill_activation_bytes_peak: int
    resident_bytes_peak: int
    workers: tuple[WorkerReport, ...]

    @property
    def num_requests(self) -> int:
        """Finished requests, whatever the reason."""
        return sum(self.requests.values())

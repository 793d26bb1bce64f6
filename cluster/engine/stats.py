"""Measures an engine: for the sinks of `metrics.py` while it runs, for an `EngineReport` after."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from saqqara.cluster.errors import Cause
from saqqara.cluster.outcome import FinishReason
from saqqara.cluster.scheduling.ledger import Usage
from saqqara.workers.plan import StepResult, WorkerInfo

from .metrics import Metrics, Sink
from .report import BatchRows, EngineReport, LatencyRecorder, WorkerReport

_PUBLISH_SECONDS = 0.5  # gauges and per-layer counters need not follow every step


class EngineStats:
    """Everything that is counted about one engine. Times are in seconds, from any fixed point."""

    def __init__(
        self, model: str, retention: str, workers: Sequence[WorkerInfo], sinks: Sequence[Sink]
    ) -> None:
        self._metrics = Metrics(sinks)
        self._model = model
        self._retention = retention
        self._published_time = -_PUBLISH_SECONDS
        self._unpublished: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self.set_workers(workers)
        self.reset()
        self.set_ready(True)

    def set_workers(self, workers: Sequence[WorkerInfo]) -> None:
        """The engine runs on these workers from now on; their pools are empty."""
        self._workers = tuple(workers)
        self._num_layers = max(w.stop_layer for w in workers)
        self._pages_free = [w.num_pages for w in workers]
        self._memory = [w.memory for w in workers]
        self._usage = Usage(0, 0)

    def reset(self) -> None:
        """Start the report's measurements anew; the sinks' counters go on."""
        self._requests: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._phase_seconds: defaultdict[str, float] = defaultdict(float)
        self._first_token = LatencyRecorder()
        self._inter_token = LatencyRecorder()
        self._e2e = LatencyRecorder()
        self._recoveries: Counter[str] = Counter()
        self._down_seconds = 0.0
        self._usage_peak = Usage(0, 0)
        self._running_peak = 0
        self._ring_bytes_peak = 0
        self._kept_L = np.zeros(self._num_layers, dtype=np.int64)
        self._dropped_L = np.zeros(self._num_layers, dtype=np.int64)
        self._first_time: float | None = None
        self._last_time: float | None = None

    def added(self, now: float) -> None:
        """A request has come in."""
        self._first_time = now if self._first_time is None else self._first_time

    def prompt(self, num_tokens: int) -> None:
        """A request's prompt is prefilled for the first time."""
        self._count("prompt_tokens", "vllm:prompt_tokens", num_tokens)

    def first_token(self, seconds: float) -> None:
        """A request has its first token, this long after it came in."""
        self._first_token.add(seconds)
        self._metrics.observe("vllm:time_to_first_token_seconds", seconds)

    def token(self, seconds_since_last: float | None) -> None:
        """A choice has one more token, this long after the one before (None: it is the first)."""
        self._count("generation_tokens", "vllm:generation_tokens", 1)
        if seconds_since_last is not None:
            self._inter_token.add(seconds_since_last)
            self._metrics.observe("vllm:inter_token_latency_seconds", seconds_since_last)

    def scored(self, num_tokens: int) -> None:
        """Continuation tokens have their scores."""
        self._count("scored_tokens", "saqqara:scored_tokens", num_tokens)

    def preempted(self) -> None:
        """A sequence has lost its slot."""
        self._count("num_preemptions", "vllm:num_preemptions", 1)

    def prefilled(self, method: str, kept_LH: NDArray[np.int32], prompt_tokens: int) -> None:
        """A prompt is through all layers; `kept_LH` are its kept tokens per row."""
        kept_L = kept_LH.sum(axis=1, dtype=np.int64)
        dropped_L = prompt_tokens * kept_LH.shape[1] - kept_L
        self._kept_L += kept_L
        self._dropped_L += dropped_L
        nothing = np.zeros_like(kept_L)
        kept, dropped = self._unpublished.get(method, (nothing, nothing))
        self._unpublished[method] = (kept + kept_L, dropped + dropped_L)

    def finished(self, reason: FinishReason, seconds: float) -> None:
        """A request has ended, this long after it came in."""
        self._requests[reason] += 1
        self._metrics.inc("vllm:request_success", 1, reason)
        self._e2e.add(seconds)
        self._metrics.observe("vllm:e2e_request_latency_seconds", seconds)

    def set_ready(self, is_ready: bool) -> None:
        """Whether there are workers."""
        self._metrics.set("saqqara:ready", int(is_ready))

    def recovered(self, cause: Cause, seconds: float) -> None:
        """There are workers again, this long after those before them were lost."""
        self._recoveries[cause] += 1
        self._down_seconds += seconds
        self._metrics.inc("saqqara:recoveries", 1, cause)
        self._metrics.inc("saqqara:down_seconds", seconds)
        self.set_ready(True)

    def batch(self, rows: BatchRows) -> None:
        """A batch job that runs on this engine has come this far."""
        self._metrics.set("saqqara:batch_rows", rows.num_rows)
        self._metrics.set("saqqara:batch_rows_left", rows.num_left)
        self._metrics.inc("saqqara:batch_rows_done", rows.num_answered, "answered")
        self._metrics.inc("saqqara:batch_rows_done", rows.num_errors, "error")

    def step(self, results: Sequence[StepResult], usage: Usage, now: float) -> None:
        """A step is absorbed."""
        self._counts["num_steps"] += 1
        self._last_time = now
        self._usage = usage
        self._ring_bytes_peak = max(self._ring_bytes_peak, usage.ring_bytes)
        if usage.kept_bytes > self._usage_peak.kept_bytes or (
            usage.kept_bytes == self._usage_peak.kept_bytes
            and usage.full_bytes > self._usage_peak.full_bytes
        ):
            self._usage_peak = usage
        if refused := {slot for result in results for slot in result.refused}:
            self._metrics.inc("saqqara:num_refusals", len(refused))
        slowest: dict[str, float] = {}
        for result in results:
            self._pages_free[result.rank] = result.pages_free
            self._memory[result.rank] = result.memory
            for phase, seconds in result.seconds.items():
                slowest[phase] = max(seconds, slowest.get(phase, 0.0))
        for phase, seconds in slowest.items():
            self._phase_seconds[phase] += seconds
            self._metrics.observe("saqqara:step_seconds", seconds, phase)

    def publish(self, num_running: int, num_waiting: int, now: float, *, is_idle: bool) -> None:
        """Send gauges and per-layer counters to the sinks, if it is time or the engine is idle."""
        self._running_peak = max(self._running_peak, num_running)
        if not is_idle and now - self._published_time < _PUBLISH_SECONDS:
            return
        self._published_time = now
        gauges = {
            "vllm:num_requests_running": num_running,
            "vllm:num_requests_waiting": num_waiting,
            "vllm:kv_cache_usage_perc": self._used_share(),
            "saqqara:kv_kept_bytes": self._usage.kept_bytes,
            "saqqara:kv_full_bytes": self._usage.full_bytes,
            "saqqara:kv_kept_bytes_peak": self._usage_peak.kept_bytes,
            "saqqara:kv_full_bytes_peak": self._usage_peak.full_bytes,
        }
        if is_idle:
            gauges["saqqara:pages_leaked"] = self._pages_in_use()
        for name, value in gauges.items():
            self._metrics.set(name, value)
        for worker, pages_free, memory in zip(
            self._workers, self._pages_free, self._memory, strict=True
        ):
            self._metrics.set("saqqara:num_pages", worker.num_pages, str(worker.rank))
            self._metrics.set("saqqara:pages_free", pages_free, str(worker.rank))
            for field, num_bytes in asdict(memory).items():
                kind = field.replace("_bytes", "")
                self._metrics.set("saqqara:worker_memory_bytes", num_bytes, str(worker.rank), kind)
        for method, (kept_L, dropped_L) in self._unpublished.items():
            for layer in range(self._num_layers):
                labels = (str(layer), method)
                self._metrics.inc("saqqara:kept_tokens", int(kept_L[layer]), *labels)
                self._metrics.inc("saqqara:dropped_tokens", int(dropped_L[layer]), *labels)
        self._unpublished.clear()

    def report(self, *, is_idle: bool) -> EngineReport:
        """All measurements since the last reset."""
        wall = 0.0
        if self._first_time is not None and self._last_time is not None:
            wall = max(self._last_time - self._first_time, 0.0)
        counts = self._counts
        return EngineReport(
            model=self._model,
            retention=self._retention,
            requests=dict(self._requests),
            prompt_tokens=counts["prompt_tokens"],
            generation_tokens=counts["generation_tokens"],
            scored_tokens=counts["scored_tokens"],
            num_steps=counts["num_steps"],
            num_preemptions=counts["num_preemptions"],
            num_running_peak=self._running_peak,
            recoveries=dict(self._recoveries),
            down_seconds=self._down_seconds,
            wall_seconds=wall,
            prefill_seconds=self._phase_seconds["prefill"],
            decode_seconds=self._phase_seconds["decode"],
            phase_seconds=dict(self._phase_seconds),
            prompt_tokens_per_second=counts["prompt_tokens"] / wall if wall else 0.0,
            generation_tokens_per_second=counts["generation_tokens"] / wall if wall else 0.0,
            time_to_first_token=self._first_token.summary(),
            inter_token_latency=self._inter_token.summary(),
            e2e_latency=self._e2e.summary(),
            kv_kept_bytes_peak=self._usage_peak.kept_bytes,
            kv_full_bytes_peak=self._usage_peak.full_bytes,
            kv_ring_bytes_peak=self._ring_bytes_peak,
            kept_tokens_by_layer=tuple(self._kept_L.tolist()),
            dropped_tokens_by_layer=tuple(self._dropped_L.tolist()),
            pages_leaked=self._pages_in_use() if is_idle else None,
            prefill_kv_bytes_peak=sum(m.prefill_kv_bytes_peak for m in self._memory),
            prefill_activation_bytes_peak=sum(
                m.prefill_activation_bytes_peak for m in self._memory
            ),
            resident_bytes_peak=sum(m.resident_bytes_peak for m in self._memory),
            workers=tuple(self._worker_report(rank) for rank in range(len(self._workers))),
        )

    def _worker_report(self, rank: int) -> WorkerReport:
        worker = self._workers[rank]
        return WorkerReport(
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
            pages_free=self._pages_free[rank],
            page_tokens=worker.page_tokens,
            page_bytes=worker.page_bytes,
            memory=self._memory[rank],
        )

    def _pages_in_use(self) -> int:
        return sum(w.num_pages for w in self._workers) - sum(self._pages_free)

    def _used_share(self) -> float:
        return max(
            1 - free / worker.num_pages
            for free, worker in zip(self._pages_free, self._workers, strict=True)
        )

    def _count(self, name: str, metric: str, value: int) -> None:
        self._counts[name] += value
        self._metrics.inc(metric, value)

"""Measures an engine: for the sinks of `metrics.py` while it runs, for an `EngineReport` after."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from saqqara.cluster.errors import Cause, WorkerDiedError
from saqqara.cluster.live.board import Board, Shown, Totals
from saqqara.cluster.live.finished import FinishedRequest
from saqqara.cluster.live.ranks import Ranks
from saqqara.cluster.live.snapshot import PrefixState
from saqqara.cluster.live.talks import ConversationCounts
from saqqara.cluster.scheduling.ledger import Pyramid, Usage
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import Sequence
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import StepResult, WorkerInfo, layers_of

from .metrics import Metrics, Sink, cache_config_labels
from .output import Choice, RequestState
from .report import BatchRows, EngineReport, LatencyRecorder, WorkerReport

_PUBLISH_SECONDS = 0.5  # gauges and per-layer counters need not follow every step


class EngineStats:
    """Everything that is counted about one engine. Times are in seconds, from any fixed point.

    Args:
        config: the engine's settings.
        retention: of requests that do not say, as a label.
        workers: that it runs on.
        sinks: where metrics go.
        board: where others read what the engine does.
    """

    def __init__(
        self,
        config: EngineConfig,
        retention: str,
        workers: Many[WorkerInfo],
        sinks: Many[Sink],
        board: Board,
    ) -> None:
        self._metrics = Metrics(sinks)
        self._config = config
        self._retention = retention
        self._board = board
        self._talks = ConversationCounts()
        self._published_time = -_PUBLISH_SECONDS
        self._unpublished: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._ranks = Ranks(workers)
        self._published_seconds: defaultdict[tuple[int, str], float] = defaultdict(float)
        self._totals: Counter[str] = Counter()  # since the start, whatever is reset
        self._finished: Counter[str] = Counter()
        self._ever_recovered: Counter[str] = Counter()
        self._ever_down_seconds = 0.0
        self._step_tokens = self._step_generated = 0
        self._is_ready = True
        self.set_workers(workers)
        self._prefilled = Pyramid(0, np.zeros(len(self._layers)), 0, self._layers)
        self.reset()
        self._set_ready(True)
        labels = cache_config_labels(config, workers)
        self._metrics.set("vllm:cache_config_info", 1, *labels)

    def set_workers(self, workers: Many[WorkerInfo]) -> None:
        """The engine runs on these workers from now on; their pools are empty."""
        self._layers = layers_of(workers)
        self._ranks.replace(workers)
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
        self._kept_L = np.zeros(len(self._layers), dtype=np.int64)
        self._dropped_L = np.zeros(len(self._layers), dtype=np.int64)
        self._first_time: float | None = None
        self._last_time: float | None = None

    def added(self, now: float) -> None:
        """A request has come in."""
        self._first_time = now if self._first_time is None else self._first_time

    def started(
        self,
        newest: Iterable[tuple[Sequence, bool]],
        choices: Mapping[int, tuple[RequestState, Choice]],
        now: float,
    ) -> None:
        """Sequences have a slot, some of them their first.

        Args:
            newest: the sequences, and whether another's prefill serves them, too.
            choices: of all sequences, by their arrival.
            now: when.
        """
        for sequence, is_shared in newest:
            state, choice = choices[sequence.arrival]
            if not choice.has_started:
                choice.has_started = True
                state.scheduled_time = state.scheduled_time or now
                asked = sequence.prompt_tokens
                hit = asked if is_shared else sequence.num_cached_tokens
                self._count("prefix_query_tokens", "vllm:prefix_cache_queries", asked)
                self._count("prefix_hit_tokens", "vllm:prefix_cache_hits", hit)

    def prompt(self, num_tokens: int) -> None:
        """A request's prompt is prefilled for the first time."""
        self._step_tokens += num_tokens
        self._count("prompt_tokens", "vllm:prompt_tokens", num_tokens)

    def first_token(self, seconds: float) -> None:
        """A request has its first token, this long after it came in."""
        self._first_token.add(seconds)
        self._metrics.observe("vllm:time_to_first_token_seconds", seconds)

    def token(self, seconds_since_last: float | None) -> None:
        """A choice has one more token, this long after the one before (None: it is the first)."""
        self._step_generated += 1
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
        dropped_L[list(self._layers.local_layers)] = 0
        self._prefilled = Pyramid(1, kept_L / kept_LH.shape[1], prompt_tokens, self._layers)
        self._kept_L += kept_L
        self._dropped_L += dropped_L
        nothing = np.zeros_like(kept_L)
        kept, dropped = self._unpublished.get(method, (nothing, nothing))
        self._unpublished[method] = (kept + kept_L, dropped + dropped_L)

    def finished(self, request: FinishedRequest) -> None:
        """A request has ended."""
        self._requests[request.reason] += 1
        self._finished[request.reason] += 1
        self._metrics.inc("vllm:request_success", 1, request.reason)
        self._e2e.add(request.finished - request.arrival)
        for name, value in (*request.seconds().items(), *request.sizes().items()):
            self._metrics.observe(name, value)

    def lost(self, failure: WorkerDiedError) -> None:
        """There are no workers until there are others."""
        self._ranks.lose(failure.rank)
        self._metrics.inc("saqqara:workers_lost", 1, str(failure.rank), failure.cause)
        self._set_ready(False)

    def recovered(self, cause: Cause, seconds: float) -> None:
        """There are workers again, this long after those before them were lost."""
        self._recoveries[cause] += 1
        self._ever_recovered[cause] += 1
        self._down_seconds += seconds
        self._ever_down_seconds += seconds
        self._metrics.inc("saqqara:recoveries", 1, cause)
        self._metrics.inc("saqqara:down_seconds", seconds)
        self._set_ready(True)

    def batch(self, rows: BatchRows) -> None:
        """A batch job that runs on this engine has come this far."""
        self._metrics.set("saqqara:batch_rows", rows.num_rows)
        self._metrics.set("saqqara:batch_rows_left", rows.num_left)
        self._metrics.inc("saqqara:batch_rows_done", rows.num_answered, "answered")
        self._metrics.inc("saqqara:batch_rows_done", rows.num_errors, "error")

    def step(self, results: Many[StepResult], usage: Usage, now: float) -> None:
        """A step is absorbed."""
        self._counts["num_steps"] += 1
        self._last_time = now
        self._usage = usage
        self._ring_bytes_peak = max(self._ring_bytes_peak, usage.ring_bytes)
        if usage.held_bytes > self._usage_peak.held_bytes or (
            usage.held_bytes == self._usage_peak.held_bytes
            and usage.full_bytes > self._usage_peak.full_bytes
        ):
            self._usage_peak = usage
        if refused := {slot for result in results for slot in result.refused}:
            self._metrics.inc("saqqara:num_refusals", len(refused))
        slowest: dict[str, float] = {}
        for result in results:
            self._ranks.note(result)
            for phase, seconds in result.seconds.items():
                slowest[phase] = max(seconds, slowest.get(phase, 0.0))
        for phase, seconds in slowest.items():
            self._phase_seconds[phase] += seconds
            self._metrics.observe("saqqara:step_seconds", seconds, phase)

    def publish(self, scheduler: Scheduler, now: float) -> None:
        """A step's events are told: count its tokens, and show the rest if it is time or idle."""
        self._count_step()
        self._count_blocks(scheduler)
        num_running, is_idle = scheduler.num_running, scheduler.is_idle
        self._running_peak = max(self._running_peak, num_running)
        if not is_idle and now - self._published_time < _PUBLISH_SECONDS:
            return
        self._published_time = now
        gauges = {
            "vllm:num_requests_running": num_running,
            "vllm:num_requests_waiting": scheduler.num_waiting,
            "vllm:kv_cache_usage_perc": self._ranks.used_share(scheduler.idle_pages),
            "saqqara:kv_kept_bytes": self._usage.kept_bytes,
            "saqqara:kv_full_bytes": self._usage.full_bytes,
            "saqqara:kv_local_bytes": self._usage.local_bytes,
            "saqqara:prefix_blocks": scheduler.prefixes.num_blocks,
            "saqqara:prefix_bytes": self._prefix_bytes(scheduler),
            "saqqara:kv_kept_bytes_peak": self._usage_peak.kept_bytes,
            "saqqara:kv_full_bytes_peak": self._usage_peak.full_bytes,
        }
        if is_idle:
            gauges["saqqara:pages_leaked"] = self._leaked(scheduler)
        for name, value in gauges.items():
            self._metrics.set(name, value)
        num_held_back = scheduler.num_held_back
        self._metrics.set("vllm:num_requests_waiting_by_reason", num_held_back, "deferred")
        num_wanting = scheduler.num_waiting - num_held_back
        self._metrics.set("vllm:num_requests_waiting_by_reason", num_wanting, "capacity")
        self._publish_workers()
        self._publish_conversations(scheduler)
        for method, (kept_L, dropped_L) in self._unpublished.items():
            for layer in self._layers.local_layers:
                self._metrics.inc("saqqara:local_tokens", int(kept_L[layer]), str(layer))
            for layer in self._layers.global_layers:
                labels = (str(layer), method)
                self._metrics.inc("saqqara:kept_tokens", int(kept_L[layer]), *labels)
                self._metrics.inc("saqqara:dropped_tokens", int(dropped_L[layer]), *labels)
        self._unpublished.clear()
        self._show(scheduler, now)

    def _count_blocks(self, scheduler: Scheduler) -> None:
        """Count what was stored and evicted since the last time."""
        counts = scheduler.prefixes.counts
        for name, value in (("stored", counts.stored), ("evicted", counts.evicted)):
            new = value - self._totals[f"prefix_blocks_{name}"]
            if new:
                self._count(f"prefix_blocks_{name}", f"saqqara:prefix_blocks_{name}", new)

    @staticmethod
    def _prefix_bytes(scheduler: Scheduler) -> int:
        return scheduler.prefixes.num_blocks * scheduler.ledger.block_bytes

    def _publish_conversations(self, scheduler: Scheduler) -> None:
        kept = scheduler.conversations, scheduler.host_memory
        for name, value in self._talks.gauges(*kept).items():
            self._metrics.set(name, value)
        for name, added, labels in self._talks.added(*kept):
            self._metrics.inc(name, added, *labels)

    def _publish_workers(self) -> None:
        """Send what is known of each worker."""
        ranks = self._ranks
        for worker, pages_free, memory in zip(
            ranks.workers, ranks.pages_free, ranks.memory, strict=True
        ):
            name = str(worker.rank)
            self._metrics.set("saqqara:num_pages", worker.num_pages, name)
            self._metrics.set("saqqara:pages_free", pages_free, name)
            for field, num_bytes in asdict(memory).items():
                kind = field.replace("_bytes", "")
                self._metrics.set("saqqara:worker_memory_bytes", num_bytes, name, kind)
            for phase, seconds in ranks.seconds(worker.rank).items():
                new = seconds - self._published_seconds[worker.rank, phase]
                self._metrics.inc("saqqara:worker_seconds", new, name, phase)
                self._published_seconds[worker.rank, phase] = seconds

    def _show(self, scheduler: Scheduler, now: float) -> None:
        """Leave the snapshot where others read it."""
        totals = Totals(now, self._totals["prompt_tokens"], self._totals["generation_tokens"])
        self._board.show(
            Shown(
                is_ready=self._is_ready,
                num_running=scheduler.num_running,
                num_waiting=scheduler.num_waiting,
                num_preemptions=self._totals["num_preemptions"],
                finished=dict(self._finished),
                totals=self._board.count(totals),
                prefixes=PrefixState(
                    query_tokens=self._totals["prefix_query_tokens"],
                    hit_tokens=self._totals["prefix_hit_tokens"],
                    num_blocks=scheduler.prefixes.num_blocks,
                    num_bytes=self._prefix_bytes(scheduler),
                    blocks_stored=self._totals["prefix_blocks_stored"],
                    blocks_evicted=self._totals["prefix_blocks_evicted"],
                ),
                usage=self._usage,
                usage_peak=self._usage_peak,
                used_share=self._ranks.used_share(scheduler.idle_pages),
                pyramid=scheduler.ledger.pyramid(),
                prefilled=self._prefilled,
                ranks=self._ranks.seen(are_alive=self._is_ready),
                recoveries=dict(self._ever_recovered),
                down_seconds=self._ever_down_seconds,
            )
        )

    def _count_step(self) -> None:
        """Count the tokens of the step whose events were told; once a step, not once a token."""
        generated, self._step_generated = self._step_generated, 0
        tokens, self._step_tokens = self._step_tokens + generated, 0
        if generated:
            self._count("generation_tokens", "vllm:generation_tokens", generated)
        if tokens:
            self._metrics.observe("vllm:iteration_tokens_total", tokens)

    def _set_ready(self, is_ready: bool) -> None:
        """Show whether there are workers, and which."""
        self._is_ready = is_ready
        self._published_time = -_PUBLISH_SECONDS  # the next step shows it, however soon
        workers = self._ranks.workers
        self._metrics.set("saqqara:ready", int(is_ready))
        self._metrics.set("saqqara:workers", len(workers))
        self._metrics.set("saqqara:workers_alive", len(workers) if is_ready else 0)
        for w in workers:
            layers = f"{w.start_layer}-{w.stop_layer - 1}"
            heads = f"{w.start_head}-{w.stop_head - 1}"
            labels = (str(w.rank), w.hostname, w.device, layers, heads)
            self._metrics.set("saqqara:worker_info", int(is_ready), *labels)

    def _leaked(self, scheduler: Scheduler) -> int:
        """Pages in use although no sequence is left, and nothing is kept for later ones."""
        return self._ranks.pages_in_use - int(scheduler.ledger.num_set_aside.sum())

    def report(self, scheduler: Scheduler) -> EngineReport:
        """All measurements since the last reset."""
        wall = 0.0
        if self._first_time is not None and self._last_time is not None:
            wall = max(self._last_time - self._first_time, 0.0)
        counts, ranks = self._counts, self._ranks
        return EngineReport(
            model=self._config.model,
            retention=self._retention,
            requests=dict(self._requests),
            prompt_tokens=counts["prompt_tokens"],
            generation_tokens=counts["generation_tokens"],
            scored_tokens=counts["scored_tokens"],
            prefix_query_tokens=counts["prefix_query_tokens"],
            prefix_hit_tokens=counts["prefix_hit_tokens"],
            prefix_blocks_stored=counts["prefix_blocks_stored"],
            prefix_blocks_evicted=counts["prefix_blocks_evicted"],
            prefix_bytes=self._prefix_bytes(scheduler),
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
            kv_local_bytes_peak=self._usage_peak.local_bytes,
            kv_ring_bytes_peak=self._ring_bytes_peak,
            kept_tokens_by_layer=tuple(self._kept_L.tolist()),
            dropped_tokens_by_layer=tuple(self._dropped_L.tolist()),
            pages_leaked=self._leaked(scheduler) if scheduler.is_idle else None,
            prefill_kv_bytes_peak=sum(m.prefill_kv_bytes_peak for m in self._ranks.memory),
            prefill_activation_bytes_peak=sum(
                m.prefill_activation_bytes_peak for m in self._ranks.memory
            ),
            resident_bytes_peak=sum(m.resident_bytes_peak for m in self._ranks.memory),
            workers=tuple(map(WorkerReport.of, ranks.workers, ranks.pages_free, ranks.memory)),
        )

    def _count(self, name: str, metric: str, value: int) -> None:
        self._counts[name] += value
        self._totals[name] += value
        self._metrics.inc(metric, value)

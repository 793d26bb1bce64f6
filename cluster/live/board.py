"""Where an engine's thread leaves what it shows, and others read it.

Both sides see one reference: the thread puts a new object in its place, so that readers need no
lock and never see half of one. It leaves plain values; who reads makes a `LiveStats` of them.
"""

import os
import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from saqqara.cluster.scheduling.ledger import Pyramid, Usage

from .ranks import RankSeen
from .snapshot import (
    KvState,
    LiveStats,
    PrefixState,
    PyramidState,
    QueueState,
    RankState,
    RecoveryState,
    ReplicaName,
    Throughput,
)

WINDOW_SECONDS = 5.0  # of throughput: long enough for a steady number, short enough to follow
_EDGE_SECONDS = 0.5  # the totals are known this exactly only


@dataclass(frozen=True, slots=True)
class Totals:
    """Tokens until a moment (Unix time in seconds)."""

    time: float
    prompt_tokens: int
    generation_tokens: int


@dataclass(frozen=True, slots=True)
class Shown:
    """What the engine's thread shows.

    `totals` are the latest, and those before it that the window of throughput needs. `prefilled`
    is the pyramid of the prompt that was prefilled last, for when nothing runs.
    """

    is_ready: bool
    num_running: int
    num_waiting: int
    num_preemptions: int
    finished: Mapping[str, int]
    totals: tuple[Totals, ...]
    prefixes: PrefixState
    usage: Usage
    usage_peak: Usage
    used_share: float
    pyramid: Pyramid
    prefilled: Pyramid
    ranks: tuple[RankSeen, ...]
    recoveries: Mapping[str, int]
    down_seconds: float


class Board:
    """The latest of one engine; written by its thread, read by any.

    Args:
        model: the name that requests use.
        retention: of requests that do not say.
        started: Unix time in seconds.
        replica_id: what to call the engine among several; default: its host and process.
    """

    def __init__(
        self, model: str, retention: str, started: float, replica_id: str | None = None
    ) -> None:
        hostname, pid = socket.gethostname(), os.getpid()
        self._model = model
        self._retention = retention
        self._replica = ReplicaName(
            id=replica_id or f"{hostname}-{pid}", hostname=hostname, pid=pid, started=started
        )
        self._recent: deque[Totals] = deque()
        self._shown: Shown | None = None

    def count(self, totals: Totals) -> tuple[Totals, ...]:
        """Note the totals of this moment; returns those that the window needs."""
        recent = self._recent
        recent.append(totals)
        while len(recent) > 2 and recent[1].time <= totals.time - WINDOW_SECONDS:
            recent.popleft()
        return tuple(recent)

    def show(self, shown: Shown) -> None:
        """Replace what is shown."""
        self._shown = shown

    def read(self, now: float) -> LiveStats:
        """What is shown; its rates are those of the window that ends `now`."""
        shown = self._shown
        assert shown is not None, "an engine shows itself from its start on"
        return LiveStats(
            model=self._model,
            retention=self._retention,
            replica=self._replica,
            time=shown.totals[-1].time,
            is_ready=shown.is_ready,
            queue=QueueState(
                running=shown.num_running,
                waiting=shown.num_waiting,
                finished=dict(shown.finished),
                preemptions=shown.num_preemptions,
            ),
            throughput=throughput(shown.totals, now),
            kv_cache=_kv_cache(shown),
            prefixes=shown.prefixes,
            pyramid=_pyramid(shown),
            ranks=[_rank(seen) for seen in shown.ranks],
            recoveries=RecoveryState(
                by_cause=dict(shown.recoveries), down_seconds=shown.down_seconds
            ),
        )


def throughput(totals: tuple[Totals, ...], now: float) -> Throughput:
    """Tokens per second in the window that ends `now`, from totals in order of time.

    An engine that is idle notes no totals, so the window may begin long after the last ones.
    """
    last = totals[-1]
    before = [t for t in totals if t.time <= now - WINDOW_SECONDS]
    base = before[-1] if before else totals[0]
    seconds = min(max(now - base.time, _EDGE_SECONDS), WINDOW_SECONDS + _EDGE_SECONDS)
    return Throughput(
        prompt_tokens_per_second=(last.prompt_tokens - base.prompt_tokens) / seconds,
        generation_tokens_per_second=(last.generation_tokens - base.generation_tokens) / seconds,
        window_seconds=WINDOW_SECONDS,
        prompt_tokens=last.prompt_tokens,
        generation_tokens=last.generation_tokens,
    )


def _kv_cache(shown: Shown) -> KvState:
    pyramid = shown.pyramid
    return KvState(
        page_tokens=shown.ranks[0].worker.page_tokens,
        num_pages=sum(seen.worker.num_pages for seen in shown.ranks),
        pages_free=sum(seen.pages_free for seen in shown.ranks),
        usage=shown.used_share,
        kept_tokens=pyramid.mean_kept * pyramid.num_sequences,
        full_tokens=pyramid.full_tokens,
        kept_bytes=shown.usage.kept_bytes,
        full_bytes=shown.usage.full_bytes,
        kept_bytes_peak=shown.usage_peak.kept_bytes,
        full_bytes_peak=shown.usage_peak.full_bytes,
        local_bytes=shown.usage.local_bytes,
        local_bytes_peak=shown.usage_peak.local_bytes,
    )


def _pyramid(shown: Shown) -> PyramidState:
    is_live = shown.pyramid.num_sequences > 0
    pyramid = shown.pyramid if is_live else shown.prefilled
    return PyramidState(
        is_live=is_live,
        num_sequences=pyramid.num_sequences,
        kept_tokens=pyramid.kept_L.tolist(),
        full_tokens=pyramid.full_tokens / max(pyramid.num_sequences, 1),
        windows=list(pyramid.layers.windows) if pyramid.layers.window else [],
    )


def _rank(seen: RankSeen) -> RankState:
    worker = seen.worker
    return RankState(
        rank=worker.rank,
        pipeline_rank=worker.pipeline_rank,
        tensor_rank=worker.tensor_rank,
        hostname=worker.hostname,
        device=worker.device,
        layers=(worker.start_layer, worker.stop_layer),
        kv_heads=(worker.start_head, worker.stop_head),
        is_alive=seen.is_alive,
        num_pages=worker.num_pages,
        pages_free=seen.pages_free,
        resident_bytes=seen.memory.resident_bytes,
        seconds=dict(seen.seconds),
        times_lost=seen.times_lost,
    )

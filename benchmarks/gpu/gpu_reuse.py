"""Memory that is used again on a GPU, for `gpu_check.py`: prefixes, turns, parked sequences."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_engine import OFTEN_TRIMMED, TINY
from gpu_models import Load, Shape, random_worker
from gpu_report import Bench, Row
from torch import Tensor

from saqqara.compression.retention import Retention
from saqqara.workers.plan import (
    CachedPrefix,
    DecodeItem,
    NewSequence,
    Parking,
    PrefillGroup,
    SamplingSpec,
    StepPlan,
    StepResult,
)
from saqqara.workers.worker import Worker

FULL = Retention.parse("full")
SNAPKV = Retention.parse({"method": "snapkv", "window": 4, "budget": 24})
TRIMMED = Retention.parse(OFTEN_TRIMMED)
_GREEDY = SamplingSpec(temperature=0.0)
_FIRST, _SECOND, _OTHER = range(3)  # slots
_TOLERANCE = 1e-3  # of keys and values in float32, whose sums are taken over other tiles
_ROUNDS = 3


@dataclass
class Steps:
    """A worker's steps; its integrity is proven after each, but where they are timed.

    Attributes:
        replayed: decode steps that were replayed as graphs.
    """

    worker: Worker
    is_timed: bool = False
    replayed: int = 0
    _step: int = field(default=0)

    def __post_init__(self) -> None:
        on_device = self.worker._decode._on_device
        if on_device is None:
            return
        replay: Callable[..., Tensor] = on_device._replay

        def counted(*given: Any) -> Tensor:
            self.replayed += 1
            return replay(*given)

        on_device._replay = counted  # type: ignore[method-assign, assignment]

    def execute(self, **parts: Any) -> StepResult:
        """One step, which refuses nothing."""
        self._step += 1
        result = self.worker.execute(StepPlan(self._step, **parts))
        if not self.is_timed:
            self.worker.check_integrity()
        if result.refused or result.faults:
            raise RuntimeError(f"slots {result.refused} were refused: {result.faults}")
        return result

    def prefill(self, new: NewSequence) -> list[int]:
        """The token after a prompt."""
        group = PrefillGroup((new.slot,), 0, self.worker.spec.num_layers)
        return [s.token_id for s in self.execute(new=(new,), prefill=(group,)).sampled]

    def decode(self, slot: int, position: int, steps: int) -> list[int]:
        """The tokens of steps that begin with the one at `position`."""
        items = (DecodeItem(slot, position + step) for step in range(steps))
        return [s.token_id for item in items for s in self.execute(decode=(item,)).sampled]

    def rows(self, slot: int) -> list[Tensor]:
        """Keys and values of each row."""
        kv = self.worker.kv
        places = [(layer, head) for layer in range(kv.num_layers) for head in range(kv.num_heads)]
        return [x for place in places for x in kv.read(slot, *place)]


def new_sequence(
    slot: int, prompt: Sequence[int], retention: Retention, known: Sequence[int] = (), **more: Any
) -> NewSequence:
    """A greedy sequence with a prompt and tokens that are known after it."""
    ids = np.array([*prompt, *known], dtype=np.int32).tobytes()
    return NewSequence(slot, ids, len(prompt), _GREEDY, retention, **more)


def check_reuse(bench: Bench, load: Load, new_tokens: int) -> Iterator[Row]:
    """Whether what is used again is what would be computed, in float32."""
    exact = replace(bench, dtype=torch.float32)
    with random_worker(exact, TINY, load, 3, kv_memory_gib=0.05) as (worker, settings):
        steps, prompt = Steps(worker), list(load.prompts(TINY.vocab, 1)[0])
        num_blocks = (len(prompt) - SNAPKV.window) // settings.page_tokens
        blocks = tuple(range(num_blocks))
        stored = CachedPrefix(stored=blocks)
        steps.prefill(new_sequence(_FIRST, prompt, FULL, prefix=stored))
        steps.execute(free=(_FIRST,))
        for what, retention, prefix in (
            ("copied, full", FULL, CachedPrefix(blocks)),
            ("shared, full", FULL, CachedPrefix(blocks, is_shared=True)),
            ("copied, snapkv", SNAPKV, CachedPrefix(blocks)),
        ):
            name = f"prompt behind cached pages, {what}, as computed whole"
            yield _hit(steps, name, prompt, retention, prefix, new_tokens)
        for what, retention in (("full", FULL), ("snapkv", SNAPKV), ("trimmed", TRIMMED)):
            yield _parked(
                steps, f"parked on the host and back, {what}", prompt, retention, new_tokens
            )
        yield _turn(
            steps, "next turn of a conversation, full, as its whole prompt", prompt, new_tokens
        )
        steps.execute(evict=blocks)
        left = worker.kv.num_pages - worker.kv.pages_free
        yield Row("pages left over", f"{left}", {"pages": float(left)}, _right(left == 0))


def _right(is_right: bool) -> str:
    return "ok" if is_right else "wrong"


def _hit(
    steps: Steps,
    what: str,
    prompt: list[int],
    retention: Retention,
    prefix: CachedPrefix,
    new_tokens: int,
) -> Row:
    found = []
    for slot, of_prompt in ((_FIRST, None), (_SECOND, prefix)):
        new = new_sequence(slot, prompt, retention, prefix=of_prompt)
        tokens = steps.prefill(new)
        rows = steps.rows(slot)
        found.append((tokens + steps.decode(slot, len(prompt), new_tokens), rows))
    (tokens, rows), (again, rows_again) = found
    most = max(float((a - b).abs().max()) for a, b in zip(rows, rows_again, strict=True))
    steps.execute(free=(_FIRST, _SECOND))
    same = sum(a == b for a, b in zip(tokens, again, strict=True))
    result = f"{same} of {len(tokens)} tokens; keys and values at most {most:.1g} off"
    numbers = {"same": float(same), "tokens": float(len(tokens)), "deviation": most}
    return Row(what, result, numbers, _right(same == len(tokens) and most <= _TOLERANCE))


def _parked(
    steps: Steps, what: str, prompt: list[int], retention: Retention, new_tokens: int
) -> Row:
    """One of two alike leaves its slot; another takes its pages before it comes back elsewhere."""
    known, before = {}, steps.replayed
    for slot in (_FIRST, _SECOND):
        tokens = steps.prefill(new_sequence(slot, prompt, retention))
        known[slot] = tokens + steps.decode(slot, len(prompt), new_tokens)
    recorded = steps.replayed - before  # none where steps note what only this retention asks for
    steps.execute(park=(Parking(_SECOND, 7),), free=(_SECOND,))
    steps.prefill(new_sequence(_OTHER, prompt[::-1], FULL))
    steps.execute(free=(_OTHER,))
    fed = len(prompt) + new_tokens
    back = {"resumes": 7, "resumed_tokens": fed}
    steps.execute(new=(new_sequence(_OTHER, prompt, retention, known[_SECOND], **back),))
    pairs = list(zip(steps.rows(_FIRST), steps.rows(_OTHER), strict=True))
    same = sum(torch.equal(a, b) for a, b in pairs)
    before = steps.replayed
    tokens, again = (steps.decode(slot, fed, new_tokens) for slot in (_FIRST, _OTHER))
    replayed = steps.replayed - before
    steps.execute(free=(_FIRST, _OTHER))
    is_right = same == len(pairs) and tokens == again and known[_FIRST] == known[_SECOND]
    result = f"{same} of {len(pairs)} rows bit for bit; {replayed} steps replayed as graphs after"
    numbers = {"same": float(same), "rows": float(len(pairs)), "replayed": float(replayed)}
    has_graphs = steps.worker._graphs is not None and retention is not TRIMMED
    is_right &= replayed == recorded == 2 * new_tokens if has_graphs else replayed == recorded
    return Row(what, result, numbers, _right(is_right))


def _turn(steps: Steps, what: str, prompt: list[int], new_tokens: int) -> Row:
    first, more = prompt[: len(prompt) // 2], prompt[len(prompt) // 2 :]
    said = steps.prefill(new_sequence(_FIRST, first, FULL))
    said += steps.decode(_FIRST, len(first), new_tokens)
    steps.execute(park=(Parking(_FIRST, 9, to_host=False),), free=(_FIRST,))
    whole = [*first, *said, *more]
    back: dict[str, Any] = {"resumes": 9, "resumed_tokens": len(first) + new_tokens}
    found = []
    for slot, resumed in ((_FIRST, back), (_SECOND, {})):
        tokens = steps.prefill(new_sequence(slot, whole, FULL, **resumed))
        found.append(tokens + steps.decode(slot, len(whole), new_tokens))
    steps.execute(free=(_FIRST, _SECOND))
    same = sum(a == b for a, b in zip(*found, strict=True))
    numbers = {"same": float(same), "tokens": float(len(found[0]))}
    return Row(what, f"{same} of {len(found[0])} tokens", numbers, _right(found[0] == found[1]))


def measure_reuse(bench: Bench, shape: Shape, load: Load) -> Iterator[Row]:
    """What a prompt costs whole, behind a cached prefix, and parked on the host and back."""
    with random_worker(bench, shape, load, 3) as (worker, settings):
        steps, prompt = Steps(worker, is_timed=True), list(load.prompts(shape.vocab, 1)[0])
        num_blocks = (len(prompt) - 1) * 9 // 10 // settings.page_tokens
        blocks = CachedPrefix(tuple(range(num_blocks)), is_shared=True)
        filling = CachedPrefix(stored=blocks.cached)
        steps.prefill(new_sequence(_OTHER, prompt, FULL, prefix=filling))
        steps.execute(free=(_OTHER,))
        seconds: dict[str, list[float]] = {}

        def timed(name: str, work: Callable[[], object]) -> None:
            started = time.perf_counter()
            work()
            if bench.device.type == "cuda":
                torch.cuda.synchronize(bench.device)
            seconds.setdefault(name, []).append(time.perf_counter() - started)

        num_bytes = 0
        for _ in range(1 + _ROUNDS):
            bench.deadline.check()
            whole = new_sequence(_FIRST, prompt, FULL)
            timed("whole", partial(steps.prefill, whole))
            hit = new_sequence(_SECOND, prompt, FULL, prefix=blocks)
            timed("hit", partial(steps.prefill, hit))
            steps.execute(free=(_SECOND,))
            timed("park", partial(steps.execute, park=(Parking(_FIRST, 7),), free=(_FIRST,)))
            num_bytes = worker._shard.parked.host_bytes
            back = {"resumes": 7, "resumed_tokens": len(prompt)}
            new = new_sequence(_FIRST, prompt, FULL, [5], **back)
            timed("resume", partial(steps.execute, new=(new,)))
            steps.execute(free=(_FIRST,))
        whole_s, hit_s, park_s, resume_s = (
            statistics.median(seconds[name][1:]) for name in ("whole", "hit", "park", "resume")
        )
        share = num_blocks * settings.page_tokens / len(prompt)
        where = f"{shape.name}, {len(prompt)} tokens"
        yield Row(
            f"prompt behind a cached {share:.0%}, {where}",
            f"{1e3 * hit_s:.1f} ms; whole {1e3 * whole_s:.1f} ms",
            {"seconds": hit_s, "whole_seconds": whole_s, "cached_share": share},
        )
        rate = num_bytes / park_s
        yield Row(
            f"parked on the host and back, {where}",
            f"{1e3 * park_s:.1f} + {1e3 * resume_s:.1f} ms for {num_bytes / 2**20:.0f} MiB, "
            f"{rate / 1e9:.1f} GB/s there; prefill {1e3 * whole_s:.1f} ms",
            {
                "park_seconds": park_s,
                "resume_seconds": resume_s,
                "bytes": float(num_bytes),
                "prefill_seconds": whole_s,
            },
        )

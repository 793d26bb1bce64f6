"""Generation through the scheduler and one worker, by token ids: continuous batching, as served."""

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from gpu_models import Load
from gpu_report import Bench, Row
from gpu_trace import StepTrace

from saqqara.cluster.scheduling.events import Finished, Preempted
from saqqara.cluster.scheduling.ledger import Ledger
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import TokenRequest
from saqqara.compression.retention import Retention
from saqqara.configs.quantum import prefill_quantum
from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers.plan import SamplingSpec, StepPlan
from saqqara.workers.worker import Worker

_SPARE_SHARE = 0.02  # of the pool, which admission leaves free
_GREEDY = SamplingSpec(temperature=0.0)


@dataclass(frozen=True)
class _After:
    """Ends an output after so many tokens, and at no other."""

    max_tokens: int | None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = True


@dataclass(frozen=True)
class Generated:
    """What a run made and what it took.

    Attributes:
        tokens: of each prompt, in order.
        seconds: from the first plan to the last result.
        step_seconds: of the steps in which all sequences decoded and none was prefilled.
        kept_bytes: of the pages in use, as a mean over all steps with decoding.
        full_bytes: what full retention would have used, as the same mean.
        num_preemptions: sequences that had to make room and came back.
    """

    tokens: list[list[int]]
    seconds: float
    step_seconds: tuple[float, ...]
    kept_bytes: float
    full_bytes: float
    num_preemptions: int

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the whole run, prefill included."""
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def kept_share(self) -> float:
        """Mean bytes of pages, as a share of full retention's."""
        return self.kept_bytes / self.full_bytes if self.full_bytes else 1.0

    def row(self, what: str, **numbers: float) -> Row:
        """A line of the table."""
        batch = len(self.tokens)
        preempted = f", {self.num_preemptions} preemptions" if self.num_preemptions else ""
        return Row(
            f"{what}, batch {batch}",
            f"{self.tokens_per_second:.0f} tokens/s in {self.seconds:.1f} s; mean KV "
            f"{self.kept_bytes / 2**30:.2f} GiB, {self.kept_share:.0%} of full{preempted}",
            {
                "tokens_per_second": self.tokens_per_second,
                "seconds": self.seconds,
                "batch": batch,
                "mean_kept_bytes": self.kept_bytes,
                "kept_share": self.kept_share,
                "preemptions": self.num_preemptions,
                **numbers,
            },
        )


def generate(
    bench: Bench,
    worker: Worker,
    settings: WorkerSettings,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    retention: Retention,
    check_pages: bool = False,
    trace: StepTrace | None = None,
) -> Generated:
    """Greedy tokens after each prompt.

    Args:
        bench: its deadline holds.
        worker: with no sequence; it has none afterwards, whatever happens.
        settings: the worker's.
        prompts: token ids.
        new_tokens: after each prompt.
        retention: of all.
        check_pages: prove after each step that every page has one owner.
        trace: records some of the steps in which all sequences decode.

    Raises:
        OutOfTimeError: the deadline is over.
        RuntimeError: a sequence does not fit the pool.
    """
    scheduler = Scheduler(
        [worker.info],
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len or worker.spec.max_position,
        max_prefill_tokens=settings.max_prefill_tokens,
        prefill_quantum=prefill_quantum(
            "auto", worker.info.device, 1, worker.spec.layer_parameters
        ),
    )
    ends = _After(new_tokens)
    sequences = [
        scheduler.add(TokenRequest(str(i), prompt, ends, retention), _GREEDY)
        for i, prompt in enumerate(prompts)
    ]
    held: set[int] = set()
    step_seconds: list[float] = []
    kept: list[tuple[int, int]] = []
    num_preemptions = 0
    started = time.perf_counter()
    try:
        while not scheduler.is_idle:
            bench.deadline.check()
            plan = scheduler.schedule()
            assert plan is not None, "sequences wait, and nothing is planned"
            held = (held - set(plan.free)) | {new.slot for new in plan.new}
            is_plain = len(plan.decode) == len(prompts) and not plan.prefill
            step_started = time.perf_counter()
            with trace.step() if trace is not None and is_plain else nullcontext():
                results = [worker.execute(plan)]
            if is_plain:
                step_seconds.append(time.perf_counter() - step_started)
            if plan.decode:
                usage = scheduler.ledger.usage()
                kept.append((usage.kept_bytes, usage.full_bytes))
            for event in scheduler.absorb(plan, results):
                num_preemptions += isinstance(event, Preempted)
                if isinstance(event, Finished) and event.sequence.error is not None:
                    raise RuntimeError(event.sequence.error)
            if check_pages:
                worker.check_integrity()
    finally:
        if held:
            worker.execute(StepPlan(-1, free=tuple(sorted(held))))
    seconds = time.perf_counter() - started
    kept_mean, full_mean = (statistics.fmean(x) for x in zip(*(kept or [(0, 0)]), strict=True))
    tokens = [sequence.output_token_ids for sequence in sequences]
    return Generated(tokens, seconds, tuple(step_seconds), kept_mean, full_mean, num_preemptions)


def largest_batch(
    worker: Worker, settings: WorkerSettings, load: Load, retention: Retention
) -> int:
    """Sequences of a load that the worker's pool holds at their longest, by the ledger's count."""
    ledger = Ledger([worker.info], 1)
    need = ledger.demand(retention, load.prompt_tokens).most(load.new_tokens)
    fitting = int(worker.info.num_pages * (1 - _SPARE_SHARE)) // int(need[0])
    return max(1, min(fitting, settings.max_num_seqs))

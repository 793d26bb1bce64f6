"""An engine in this process, stepped by hand, so that every step can be timed by itself.

The real engine, scheduler and worker; only the thread that usually steps them is left out.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import median

import torch

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.executor import LocalExecutor
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.speed.profile import Row, profile_steps
from saqqara.workers.models.spec import load_spec
from saqqara.workers.plan import StepPlan, StepResult

GIB = 2**30
SPARE_BYTES = 2**20  # of the pool, for rounding


@dataclass(frozen=True)
class Step:
    """One step of the engine.

    Attributes:
        seconds: wall time, scheduling and detokenisation included.
        num_prefill: prompts in prefill.
        positions: where each decoding sequence's token stands.
    """

    seconds: float
    num_prefill: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """All steps of one call on `num_prompts` prompts, and the peaks of memory in it.

    Attributes:
        num_prompts: how many.
        steps: in their order.
        kv_kept_bytes: most bytes of KV pages in use at one moment.
        prefill_kv_bytes: most bytes of keys and values held by prompts in prefill: their pages, and
            the fresh ones of the layer being computed.
    """

    num_prompts: int
    steps: tuple[Step, ...]
    kv_kept_bytes: int
    prefill_kv_bytes: int

    @property
    def prefill_seconds(self) -> float:
        """Wall time of the steps with prefill."""
        return sum(step.seconds for step in self.steps if step.num_prefill)

    @property
    def decode_steps(self) -> tuple[Step, ...]:
        """The steps in which all prompts decode and nothing else happens."""
        return tuple(
            step
            for step in self.steps
            if step.num_prefill == 0 and len(step.positions) == self.num_prompts
        )

    @property
    def decode_step_seconds(self) -> float:
        """Median over the decode steps."""
        return median(step.seconds for step in self.decode_steps)


class RecordingExecutor(LocalExecutor):
    """A LocalExecutor that remembers the last plan until it is taken."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._last_plan: StepPlan | None = None

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Run a step; the future is done."""
        self._last_plan = plan
        return super().execute(plan)

    def take_plan(self) -> StepPlan | None:
        """The plan of the step just done; None if it had nothing to execute."""
        plan, self._last_plan = self._last_plan, None
        return plan


class SteppedEngine:
    """One loaded model in bfloat16 for many runs, with room for twice all prompts at full length.

    All prompts are prefilled in one step, so that afterwards all of them decode together.

    Args:
        model: folder of the model.
        num_threads: of the CPU.
        num_prompts: at most, in one run.
        max_model_len: most tokens of a prompt and its answer.
    """

    def __init__(self, model: str, num_threads: int, num_prompts: int, max_model_len: int) -> None:
        self.spec = load_spec(model)
        page_tokens = EngineConfig(model=model).page_tokens
        row_tokens = -(-max_model_len // page_tokens) * page_tokens
        row_token_bytes = self.spec.kv_bytes_per_row_token(torch.bfloat16)
        rows = self.spec.num_layers * self.spec.num_kv_heads
        slots = 2 * num_prompts  # the scheduler admits a prompt only while some pages stay free
        pool_bytes = slots * rows * row_tokens * row_token_bytes + SPARE_BYTES
        self.config = EngineConfig(
            model=model,
            dtype="bfloat16",
            num_threads=num_threads,
            max_num_seqs=slots,
            max_model_len=max_model_len,
            max_prefill_tokens=num_prompts * max_model_len,
            kv_memory_gib=pool_bytes / GIB,
            prefix_caching=False,
        )
        self._executor = RecordingExecutor(self.config)
        self._engine = Engine(self.config, self._executor, Tokenizer.load(model), self.spec)
        self._num_requests = 0

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, retention: str, budget: int | None
    ) -> Run:
        """Answer all prompts greedily with `new_tokens` tokens each, timing every step."""
        self._executor.worker.warm_up()  # also forgets the peaks of the run before
        self._engine.reset_stats()
        self._submit(prompts, new_tokens, retention, budget)
        steps = []
        while self._engine.has_unfinished():
            started = time.perf_counter()
            self._engine.step()
            seconds = time.perf_counter() - started
            plan = self._executor.take_plan()
            if plan is None:
                continue
            steps.append(
                Step(
                    seconds,
                    sum(len(group.slots) for group in plan.prefill),
                    tuple(item.position for item in plan.decode),
                )
            )
        report = self._engine.report()
        prefills = [step.num_prefill for step in steps if step.num_prefill]
        assert prefills == [len(prompts)], "the pool holds all prompts, and one step takes them"
        assert report.num_preemptions == 0
        return Run(
            len(prompts), tuple(steps), report.kv_kept_bytes_peak, report.prefill_kv_bytes_peak
        )

    def profile(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, retention: str, budget: int | None
    ) -> list[Row]:
        """Where the time of such a run goes; later runs are traced as well, so do this last."""
        self._submit(prompts, new_tokens, retention, budget)
        rows, _ = profile_steps(self._engine, self._executor.worker)
        return rows

    def close(self) -> None:
        """Release the worker."""
        self._engine.shutdown()

    def _submit(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, retention: str, budget: int | None
    ) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        for prompt in prompts:
            self._engine.add(
                Request(
                    str(self._num_requests), prompt, sampling, retention=retention, budget=budget
                )
            )
            self._num_requests += 1

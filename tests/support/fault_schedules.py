"""Random faults under the real engine: a schedule is its seed, and is the same whenever it is run.

The engine has a `SimulatedExecutor`, whose ranks are those of `FakeReplica`: they keep books of
pages row by row, assert that every plan can be carried out, and say a token that is a hash of all
tokens before it. So a token that is lost, doubled or wrong is seen, and so is a page.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import starmap
from math import ceil
from typing import Any

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.errors import Cause
from saqqara.cluster.recovery.attempts import RecoveryLimits
from saqqara.cluster.recovery.suspects import Suspects
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.simulation.clock import SimulatedClock
from saqqara.cluster.simulation.executor import Mishap, SimulatedExecutor
from saqqara.compression.scores import SnapKV
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import StepPlan, StepResult, WorkerInfo

from .fake_model import SPEC, Ascii, continue_text
from .fake_replica import FakeReplica, RaggedRetention, make_workers, token_logprob

RETENTIONS: tuple[Any, ...] = (
    None,
    {"method": "pyramidkv", "window": 3, "sinks": 1, "budget": 12},
    {"method": "snapkv", "window": 3, "budget": 12, "decode": {"slack_pages": 1}},
    RaggedRetention(method="ragged", score=SnapKV(), budget=12, window=3),
)
KINDS: tuple[Mishap, ...] = (
    *(Mishap(kind) for kind in ("died", "died", "failed", "unreachable", "hung", "lost")),
    *(Mishap("late", seconds) for seconds in (0.1, 1.0, 30.0)),
)
LOSSES_OF_A_GUILTY = 3  # while it runs alone, as docs/serving.md says
MOST_CALLS, MOST_SECONDS = 1500, 20_000.0  # the longest take some 300 calls
_SIZES = ((44, 56, 64, 120), ((4,), (2, 2), (1, 2, 1)))


class Books:
    """The ranks of one start."""

    def __init__(self, workers: Sequence[WorkerInfo]) -> None:
        self.replica = FakeReplica(workers)

    def execute(self, plan: StepPlan) -> list[StepResult]:
        """Carry out a plan."""
        return self.replica.run(plan)


class Witness(Suspects):
    """Suspects, and how often each request was alone in flight when a rank was lost."""

    def __init__(self) -> None:
        super().__init__()
        self.alone: Counter[str] = Counter()

    def lost(self, in_flight: Sequence[str], cause: Cause) -> str | None:
        if len(in_flight) == 1 and cause != "unreachable":
            self.alone[in_flight[0]] += 1
        return super().lost(in_flight, cause)


@dataclass(slots=True)
class Asked:
    """A request and what has come of it."""

    name: str
    num_tokens: int
    num_choices: int
    continuation: str | None
    retention: Any
    priority: int
    aborted: bool = False
    num_finished: int = 0
    lengths: list[int] = field(default_factory=list)

    def request(self) -> Request:
        """What the engine is given."""
        params = SamplingParams(n=self.num_choices, max_tokens=self.num_tokens, ignore_eos=True)
        return Request(
            self.name,
            self.name,
            params,
            retention=self.retention,
            priority=self.priority,
            score_continuation=self.continuation,
            stream=True,
        )


@dataclass(slots=True)
class Tally:
    """What some schedules were made of."""

    schedules: int = 0
    calls: int = 0
    steps: int = 0
    compared: int = 0
    recoveries: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        """Count another's as well."""
        self.schedules += other.schedules
        self.calls += other.calls
        self.steps += other.steps
        self.compared += other.compared
        self.recoveries.update(other.recoveries)
        self.finished.update(other.finished)


class Schedule:
    """What a seed stands for: requests, ranks, and what befalls them when.

    Args:
        seed: of all that is drawn.
        tell: is told of every step, in a line.
    """

    def __init__(self, seed: int, tell: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self._tell = tell
        self.rng = rng = random.Random(seed)
        self.clock = SimulatedClock()
        num_pages, stages = (rng.choice(sizes) for sizes in _SIZES)
        workers = make_workers(num_pages, stages=stages)  # type: ignore[arg-type]
        self.every = rng.choice((6, 12, 24))
        self.executor = SimulatedExecutor(
            workers,
            Books,
            partial(_step_seconds, len(workers)),
            self.clock,
            controller_seconds=0.001,
            restart_seconds=rng.choice((0.1, 0.6)),
            mishaps=cache(self._mishap),
            failing_starts=[n for n in range(20) if rng.random() < 0.1],
            stale_results=rng.random() < 0.5,
            restarted=self._restarted,
        )
        config = EngineConfig(
            model="fake",
            executor="ray",
            max_num_seqs=rng.choice((2, 4, 8)),
            prefill_quantum=rng.choice((None, 8)),
            max_extend_tokens=rng.choice((4, 1024)),
        )
        self.engine = Engine(
            config,
            self.executor,
            _tokenizer(),
            SPEC,
            lookahead=rng.choice((1, 2, 3)),
            limits=RecoveryLimits(1000, first_wait_seconds=0.1, max_wait_seconds=0.5),
            clock=self.clock,
        )
        self.asked = {a.name: a for a in starmap(self._asked, enumerate(range(rng.randint(1, 7))))}
        self.tally = Tally(schedules=1)
        self.witness = self.engine._suspects = Witness()
        self.clock.at(MOST_SECONDS, _fail)
        for _ in range(rng.choice((0, 0, 1, 2))):  # also between steps, and while ranks start
            self.clock.at(rng.uniform(0.0, 1.5), self._die)

    def run(self) -> Tally:
        """Until every request has ended, and all that they held is free again."""
        waiting = list(self.asked.values())
        for _ in range(MOST_CALLS):
            while waiting and (self.rng.random() < 0.3 or not self.engine.has_unfinished()):
                self._give(waiting.pop(0))
            if self.rng.random() < 0.005:
                self._abort()
            for output in self.engine.step():
                self._check(output)
            self._compare_pages()
            self.tally.calls += 1
            if self._tell is not None:
                self._tell(self._line())
            if not waiting and not self.engine.has_unfinished():
                self._check_end()
                return self.tally
        raise AssertionError("something is left for ever")

    # What is drawn --------------------------------------------------------------------------------

    def _asked(self, number: int, _: int) -> Asked:
        rng = self.rng
        continuation = "y" * rng.randint(1, 9) if rng.random() < 0.2 else None
        return Asked(
            f"{'x' * rng.randint(0, 14)}{number}",
            num_tokens=rng.randint(1, 7),
            num_choices=1 if continuation is not None else rng.choice((1, 1, 1, 2)),
            continuation=continuation,
            retention=rng.choice(RETENTIONS),
            priority=rng.choice((0, 0, 0, 1)),
        )

    def _mishap(self, number: int) -> Mishap | None:
        rng = random.Random(f"{self.seed}/{number}")
        return rng.choice(KINDS) if rng.randrange(self.every) == 0 else None

    def _die(self) -> None:
        self.executor.lose("died")

    def _restarted(self, workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
        """Other processes find other memory."""
        num_pages = workers[0].num_pages + (8 if self.executor.num_starts % 2 else -8)
        stages = [w.stop_layer - w.start_layer for w in workers]
        return make_workers(num_pages, stages=stages)

    def _abort(self) -> None:
        asked = self.rng.choice(list(self.asked.values()))
        asked.aborted = True
        self.engine.abort(asked.name)

    def _give(self, asked: Asked) -> None:
        """To the engine, which refuses at once what its smallest rank could never hold."""
        try:
            self.engine.add(asked.request())
        except ValueError:
            workers = self.engine.scheduler.ledger.workers
            if not any(_most_pages(asked, worker) > worker.num_pages for worker in workers):
                raise
            asked.num_finished = 1
            self.tally.finished["refused"] += 1

    # What is checked ------------------------------------------------------------------------------

    def _check(self, output: RequestOutput | ScoreOutput) -> None:
        asked = self.asked[output.request_id]
        assert asked.num_finished == 0, "nothing comes after the end"
        if isinstance(output, ScoreOutput):
            self._check_scores(asked, output)
        else:
            self._check_tokens(asked, output)
        if output.finished:
            asked.num_finished += 1

    def _check_tokens(self, asked: Asked, output: RequestOutput) -> None:
        expected = _expected(asked.name, asked.num_tokens)
        lengths = [len(choice.token_ids) for choice in output.outputs]
        assert all(
            choice.token_ids == expected[:length]
            for choice, length in zip(output.outputs, lengths, strict=True)
        ), f"{asked.name}: {[c.token_ids for c in output.outputs]} is not of {expected}"
        before = asked.lengths or [0] * len(lengths)
        grown = [now - was for now, was in zip(lengths, before, strict=True)]
        assert min(grown) >= 0, f"{before}, then {lengths}"
        assert output.finished or max(grown) == 1, f"{before}, then {lengths}"
        asked.lengths = lengths
        if not output.finished:
            return
        for choice in output.outputs:
            self.tally.finished[str(choice.finish_reason)] += 1
            if choice.finish_reason == "length":
                assert choice.token_ids == expected
            else:
                self._check_excuse(asked, choice.finish_reason, output.error)

    def _check_scores(self, asked: Asked, output: ScoreOutput) -> None:
        assert output.finished
        self.tally.finished[f"score {output.finish_reason}"] += 1
        if output.finish_reason != "stop":
            self._check_excuse(asked, output.finish_reason, output.error)
            return
        tokens = [*output.prompt_token_ids, *output.token_ids]
        start = len(output.prompt_token_ids)
        expected = [token_logprob(tokens[:p], tokens[p]) for p in range(start, len(tokens))]
        assert list(zip(output.logprobs, output.ranks, strict=True)) == expected

    def _check_excuse(self, asked: Asked, reason: str | None, error: str | None) -> None:
        if reason == "abort":
            assert asked.aborted, "nobody took it back"
            return
        assert reason == "error", f"{asked.name} ended with {reason}"
        assert error is not None
        if "does not fit" in error:  # ranks that started again had fewer pages
            return
        assert f"ended the workers {LOSSES_OF_A_GUILTY} times while it ran alone" in error, error
        alone = self.witness.alone[asked.name]
        assert alone >= LOSSES_OF_A_GUILTY, f"it was lost {alone} times while it ran alone"

    def _compare_pages(self) -> None:
        """The ledger knows what every rank holds, as soon as all that it must be told is told."""
        ledger, books = self.engine.scheduler.ledger, self.executor.carried_out
        assert isinstance(books, Books)
        assert (ledger.free >= 0).all(), f"{ledger.free.tolist()} pages are free"
        if not self.engine.is_ready:
            return
        held = [w.info.num_pages - w.pages_free for w in books.replica.fakes]
        if any(worker.refused for worker in books.replica.fakes):
            return
        if (ledger._ragged_S & ledger._held_S & ~ledger._exact_SW.all(axis=1)).any():
            return
        self.tally.compared += 1
        allocated = ledger.allocated().tolist()
        assert allocated == held, f"the ledger says {allocated} pages, the ranks hold {held}"
        charged = (ledger.num_pages - ledger.free).tolist()
        assert all(c >= h for c, h in zip(charged, held, strict=True)), f"{charged} for {held}"

    def _check_end(self) -> None:
        unfinished = [a.name for a in self.asked.values() if a.num_finished != 1]
        assert not unfinished, f"{unfinished} did not end once"
        report = self.engine.report()
        assert report.pages_leaked == 0
        ledger = self.engine.scheduler.ledger
        cached = ledger.num_set_aside
        assert (ledger.free + cached == ledger.num_pages).all(), "pages are charged to nobody"
        assert sum(report.recoveries.values()) == self.executor.num_starts
        self.tally.recoveries.update(report.recoveries)
        self.tally.steps = self.executor.num_steps

    def _line(self) -> str:
        scheduler = self.engine.scheduler
        failure = self.executor.failure
        return (
            f"{self.clock.now():9.3f} s, {self.executor.num_steps} steps: "
            f"{scheduler.num_running} running, {scheduler.num_waiting} waiting, "
            f"{scheduler.num_in_flight} in flight, free pages {scheduler.ledger.free.tolist()}, "
            f"tokens { {a.name: a.lengths for a in self.asked.values()} }"
            + ("" if failure is None else f"; {failure}")
        )


def run_seeds(seeds: Sequence[int]) -> Tally:
    """Run schedules; the error of one that fails names its seed."""
    tally = Tally()
    for seed in seeds:
        schedule = Schedule(seed)
        try:
            tally.add(schedule.run())
        except Exception as error:
            error.add_note(f"schedule {seed}, call {schedule.tally.calls}")
            raise
        finally:
            schedule.engine.shutdown()
    return tally


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer(Ascii())


@cache
def _expected(prompt: str, num_tokens: int) -> tuple[int, ...]:
    return tuple(continue_text(prompt, num_tokens)[1])


def _most_pages(asked: Asked, worker: WorkerInfo) -> int:
    """What a rank would hold if nothing were dropped."""
    num_fed = 1 + len(asked.name) + max(len(asked.continuation or "") - 1, 0)
    rows = (worker.stop_layer - worker.start_layer) * (worker.stop_head - worker.start_head)
    return rows * ceil(num_fed / worker.page_tokens)


def _fail() -> None:
    raise AssertionError("something is waited for for ever")


def _step_seconds(num_stages: int, plan: StepPlan) -> list[float]:
    """Some time, that grows with the work."""
    layers = sum((g.stop_layer - g.start_layer) * len(g.slots) for g in plan.prefill)
    return [0.01 + 0.002 * layers + 0.001 * len(plan.decode)] * num_stages

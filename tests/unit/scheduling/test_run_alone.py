"""One request may have the workers to itself for a while; the others lose nothing by it."""

import random
from collections import deque

import pytest
from support.fake_replica import FakeReplica, make_workers, next_token

from saqqara.cluster.engine.intake import sampling_of
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import Sequence, TokenRequest
from saqqara.compression.retention import Retention
from saqqara.workers.plan import StepPlan, StepResult

FULL = Retention.parse("full")


class Run:
    """A scheduler over a fake replica, stepped together."""

    def __init__(self, num_pages: int, stages: tuple[int, ...] = (4,), lookahead: int = 1) -> None:
        workers = make_workers(num_pages, stages=stages)
        self.replica = FakeReplica(workers)
        self.scheduler = Scheduler(
            workers, max_num_seqs=4, max_model_len=256, lookahead=lookahead, prefill_quantum=8
        )
        self.in_flight: deque[tuple[StepPlan, list[StepResult]]] = deque()

    def add(self, name: str, prompt: tuple[int, ...], max_tokens: int, n: int = 1) -> Sequence:
        """Queue a request of `n` equal choices; returns the last of them."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = TokenRequest(name, prompt, params, FULL)
        spec = sampling_of(request).spec(0, ())
        return [self.scheduler.add(request, spec, index=i) for i in range(n)][-1]

    def step(self) -> bool:
        while (plan := self.scheduler.schedule()) is not None:
            self.in_flight.append((plan, self.replica.run(plan)))
        if self.in_flight:
            self.scheduler.absorb(*self.in_flight.popleft())
        return not self.scheduler.is_idle


def says(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def test_the_others_stand_still_and_keep_their_slots() -> None:
    run = Run(num_pages=1000)
    a, b, c = (run.add(name, (i, 2, 3), 20) for i, name in enumerate("abc"))
    while not all(s.output_token_ids for s in (a, b, c)):
        run.step()
    before = [len(s.output_token_ids) for s in (a, b, c)]
    run.scheduler.run_alone("b")
    for _ in range(5):
        run.step()
        assert run.scheduler.all_in_flight() in ([], ["b"])
    assert [len(s.output_token_ids) for s in (a, b, c)] == [before[0], before[1] + 5, before[2]]
    run.scheduler.run_alone(None)
    while run.step():
        pass
    for i, sequence in enumerate((a, b, c)):
        assert sequence.output_token_ids == says((i, 2, 3), 20)
        assert sequence.num_preemptions == 0


def test_who_waits_is_admitted_past_those_before_it() -> None:
    run = Run(num_pages=1000)
    sequences = [run.add(name, (i, 2, 3), 20, n=2) for i, name in enumerate("abcdef")]
    run.scheduler.run_alone("f")
    for _ in range(10):
        run.step()
    assert [len(s.output_token_ids) > 0 for s in sequences] == [False] * 5 + [True]
    assert run.scheduler.num_running == 2, "both of its choices"


def test_the_others_make_way_where_there_is_no_room() -> None:
    run = Run(num_pages=40)
    a = run.add("a", tuple(range(8)), 8)
    while not a.output_token_ids:
        run.step()
    b = run.add("b", tuple(range(9, 25)), 4)
    run.scheduler.run_alone("b")
    for _ in range(20):
        run.step()
    assert b.is_finished
    assert a.num_preemptions == 1
    run.scheduler.run_alone(None)
    while run.step():
        pass
    assert a.output_token_ids == says(tuple(range(8)), 8)
    assert b.output_token_ids == says(tuple(range(9, 25)), 4)


@pytest.mark.parametrize("seed", range(12))
def test_whoever_runs_alone_and_whenever_all_get_their_tokens(seed: int) -> None:
    rng = random.Random(seed)
    run = Run(rng.choice([52, 80, 400]), rng.choice([(4,), (2, 2)]), rng.choice([1, 2]))
    prompts = {
        f"r{i}": tuple(rng.randrange(128) for _ in range(rng.randint(1, 12))) for i in range(10)
    }
    sequences = {name: run.add(name, prompt, 10, n=2) for name, prompt in prompts.items()}
    alone: str | None = None
    for _ in range(3000):
        if not run.step():
            break
        if alone is None or sequences[alone].is_finished or rng.random() < 0.1:
            left = [name for name, s in sequences.items() if not s.is_finished]
            alone = rng.choice([None, *left])
            run.scheduler.run_alone(alone)
    assert run.scheduler.is_idle
    for name, prompt in prompts.items():
        assert sequences[name].output_token_ids == says(prompt, 10)

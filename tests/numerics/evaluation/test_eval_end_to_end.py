"""Quality tasks on the real model: full finds the needle, a random tenth of the tokens does not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.figures.summary import summarise
from saqqara.evaluation.session import Session
from saqqara.evaluation.tasks.forced_agreement import AgreementTask
from saqqara.evaluation.tasks.needle import NeedleTask
from saqqara.evaluation.tasks.perplexity import PerplexityTask

RANDOM = Retention.parse({"method": "random", "budget": "10%", "window": 16})


@pytest.fixture(scope="module")
def session(demo_model: Path) -> Iterator[Session]:
    config = EngineConfig(model=str(demo_model), kv_memory_gib=0.5)
    with Session(config, [RANDOM]) as session:
        yield session


def test_full_finds_needles_that_random_drops(session: Session) -> None:
    result = NeedleTask(lengths=(300,), depths=(0.5,), num_samples=3).run(session)
    full, random = ([o.score for o in result.of(label)] for label in result.labels)
    assert sum(full) >= 2
    assert sum(random) <= 1
    assert result.kept_shares[RANDOM.label] == 30 / 300


def test_less_context_costs_perplexity(session: Session) -> None:
    task = PerplexityTask(context_tokens=256, continuation_tokens=16, num_samples=2)
    full, random = summarise(task.run(session))
    assert full.figures["ratio to full"][0].value == 1.0
    assert random.figures["ratio to full"][0].value > 1.02
    assert 1 < full.figures["perplexity"][0].value < 50


def test_full_agrees_with_itself(session: Session) -> None:
    task = AgreementTask(prompt_tokens=256, max_tokens=12, num_samples=2)
    result = task.run(session)
    full, random = summarise(result)
    # Scoring and generating differ by rounding, which in bfloat16 can turn close decisions.
    assert full.figures["top-1 agreement"][0].value >= 0.9
    assert full.figures["logprob of full's token - full's"][0].value == 0.0
    assert full.figures["KL from full, nats"][0].value == 0.0
    assert random.figures["top-1 agreement"][0].value < 1.0
    assert random.figures["KL from full, nats"][0].value > 0.01
    assert {o.prompt_tokens for o in result.outcomes} == {256}

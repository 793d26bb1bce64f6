"""Plans written by hand, to drive a worker without the scheduler."""

import numpy as np

from saqqara.compression.retention import Retention
from saqqara.workers.plan import (
    DecodeItem,
    NewSequence,
    PrefillGroup,
    SampledToken,
    SamplingSpec,
    StepPlan,
)
from saqqara.workers.worker import Worker

GREEDY = SamplingSpec(temperature=0.0)


def new_sequence(
    slot: int,
    prompt: list[int],
    known: list[int] | None = None,
    sampling: SamplingSpec = GREEDY,
    retention: Retention | None = None,
    score: bool = False,
    shares_prefill_with: int | None = None,
) -> NewSequence:
    """A sequence with `known` tokens after its prompt."""
    tokens = np.array(prompt + (known or []), dtype=np.int32).tobytes()
    return NewSequence(
        slot,
        tokens,
        len(prompt),
        sampling,
        retention or Retention.parse(None),
        score,
        shares_prefill_with,
    )


def prefill_plan(worker: Worker, new: list[NewSequence], step: int = 0) -> StepPlan:
    """All layers of all new sequences in one group."""
    group = PrefillGroup(tuple(n.slot for n in new), 0, worker.spec.num_layers)
    return StepPlan(step, new=tuple(new), prefill=(group,))


def run_greedy(
    worker: Worker, prompts: list[list[int]], num_tokens: int, **settings: object
) -> list[list[SampledToken]]:
    """Prefill the prompts together and decode; one list of sampled tokens per prompt."""
    new = [new_sequence(slot, prompt, **settings) for slot, prompt in enumerate(prompts)]  # type: ignore[arg-type]
    results = [worker.execute(prefill_plan(worker, new))]
    for step in range(num_tokens - 1):
        items = tuple(DecodeItem(n.slot, n.prompt_tokens + step) for n in new)
        results.append(worker.execute(StepPlan(step + 1, decode=items)))
        worker.check_integrity()
    worker.execute(StepPlan(num_tokens, free=tuple(n.slot for n in new)))
    worker.check_integrity()
    by_slot: dict[int, list[SampledToken]] = {n.slot: [] for n in new}
    for result in results:
        for token in result.sampled:
            by_slot[token.slot].append(token)
    return list(by_slot.values())

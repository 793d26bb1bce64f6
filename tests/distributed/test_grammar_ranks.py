"""The rank that samples knows the grammars; the others follow it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from support.byte_llama import save_tiny_llama
from support.plans import GREEDY, new_sequence, prefill_plan
from support.ranks import Store, leave_together, run_ranks

from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.structured.outputs import StructuredOutputs
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.plan import DecodeItem, Grammar, StepPlan, StepResult
from saqqara.workers.worker import Worker

PATTERN = "[a-f]{3}-[0-9]{2}!"
KNOWN = "abc-"  # of the second sequence, which is resumed
LENGTH = 7


def run_rank(folder: str, rank: int, stores: Sequence[Store]) -> list[StepResult]:
    """An answer from its start, one that goes on, and one without a grammar."""
    config = EngineConfig(
        model=folder,
        dtype="float32",
        device="cpu",
        load_format="dummy",
        max_num_seqs=4,
        num_threads=1,
    )
    worker = Worker(config.for_worker(), MeshLayout(2, 2), rank, stores[0])
    grammar = Grammar(StructuredOutputs(regex=PATTERN).text, (0,))
    worker.compile_grammar(grammar)
    held = replace(GREEDY, temperature=1.0, seed=5, grammar=grammar)
    prompt, known = (Tokenizer.load(folder).encode(text) for text in ("hello", KNOWN))
    new = [
        new_sequence(0, prompt, sampling=held),
        new_sequence(1, prompt, known, sampling=held),
        new_sequence(2, prompt, sampling=GREEDY),
    ]
    results = [worker.execute(prefill_plan(worker, new))]
    resume, start = DecodeItem(1, len(prompt), len(known)), len(prompt) + len(known)
    for step in range(LENGTH - 1):
        items = [DecodeItem(slot, len(prompt) + step) for slot in (0, 2)]
        if step < LENGTH - len(KNOWN):
            items.append(DecodeItem(1, start + step - 1) if step else resume)
        results.append(worker.execute(StepPlan(step + 1, decode=tuple(items))))
    results.append(worker.execute(StepPlan(LENGTH, free=(0, 1, 2))))
    worker.check_integrity()
    leave_together(worker)
    return results


def test_two_stages_of_two_ranks_hold_an_answer_to_its_form(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    by_rank = run_ranks(partial(run_rank, str(tmp_path)), 4)
    assert not [fault for results in by_rank for result in results for fault in result.faults]
    sampled = [token for result in by_rank[2] for token in result.sampled]
    tokenizer = Tokenizer.load(tmp_path)
    for slot, start in ((0, ""), (1, KNOWN)):
        tokens = [token for token in sampled if token.slot == slot]
        assert re.fullmatch(PATTERN, start + tokenizer.decode([t.token_id for t in tokens]))
        assert [token.is_last for token in tokens] == [False] * (len(tokens) - 1) + [True]
    assert not any(token.is_last for token in sampled if token.slot == 2)

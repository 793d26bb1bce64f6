"""Every retention method, in every arrangement, keeps what its definition says.

The table is `support/methods.py`; the definitions are slow loops in float64. Greedy tokens and all
stored keys and values are compared: alone, together with sequences of all other methods in one
batch (with another attention backend, which hands prefill's normalisers on to the scores), and
sharded over ranks; at prefill, and for methods that have decode stages in each, after some cuts. A
new method is one row of the table.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.arrangements import (
    LAYOUTS,
    Outcome,
    config_of,
    is_looked_at,
    is_run,
    replay_cases,
    run_all_layouts,
    run_cases,
)
from support.methods import (
    DECODE_STAGES,
    HEADS,
    LAYERS,
    METHODS,
    NUM_COMPACTIONS,
    PREFILL,
    QUERY_HEADS,
    Case,
    cases_of,
)
from support.ranks import run_ranks
from support.slow_llama import NEAR_CUT, Entry, SlowLlama, Weights
from support.tiny import VOCAB, save_tiny

from saqqara.compression.scores import SCORES
from saqqara.compression.shapes import SHAPES
from saqqara.configs.yaml_files import CONFIG_DIR
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.worker import Worker

LENGTHS = (58, 7)
SEED = 19  # no selection of its prompts is near its cut
ARRANGEMENTS = ("alone", "batched", *LAYOUTS)
# fp32 against float64 through four layers and some tens of tokens; of keys and values of size 1 to
# 10. The keys of another token would differ by about 1.
TOLERANCE = 2e-3


def make_cases() -> list[Case]:
    # No token comes twice: in the lowest layer its keys would differ by a rotation only.
    rng = np.random.default_rng(SEED)
    prompts = [(3 + rng.permutation(VOCAB - 3)[:length]).tolist() for length in LENGTHS]
    return [case for name in METHODS for case in cases_of(name, prompts)]


CASES = make_cases()
RUNS = list(
    dict.fromkeys(
        (case.method, case.stage_name, arrangement)
        for case in CASES
        for arrangement in ARRANGEMENTS
        if is_run(case, arrangement)
    )
)


class Oracle(Outcome):
    """What the definitions say; each case is worked out when it is first asked for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._weights = Weights(model)
        self.slow: dict[Case, SlowLlama] = {}

    def know(self, case: Case) -> SlowLlama:
        if case in self.slow:
            return self.slow[case]
        slow = SlowLlama(self._weights, case.rules, case.stage.slack_tokens)
        self.slow[case] = slow

        def look(fed: int) -> None:
            if is_looked_at(case, fed):
                for layer, rows in enumerate(slow.rows):
                    for head, row in enumerate(rows):
                        self.rows[case, fed, layer, head] = stacked(row)

        self.tokens[case], _ = slow.greedy(list(case.prompt), case.stage.num_steps + 1, look)
        return slow


def stacked(row: list[Entry]) -> Any:
    return torch.stack([torch.cat([entry.key, entry.value]) for entry in row]).numpy()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("suite")
    return folder, save_tiny("llama-gqa", folder, num_layers=LAYERS)


@pytest.fixture(scope="module")
def oracle(tiny: tuple[Path, Any]) -> Oracle:
    return Oracle(tiny[1])


@pytest.fixture(scope="module")
def alone(tiny: tuple[Path, Any]) -> Outcome:
    worker = Worker.local(config_of(tiny[0], MeshLayout(), 1).for_worker())
    outcome = Outcome()
    for case in CASES:
        outcome.join(run_cases(worker, [case]))
    return outcome


@pytest.fixture(scope="module")
def batched(tiny: tuple[Path, Any]) -> Outcome:
    config = config_of(tiny[0], MeshLayout(), len(CASES), attention="reference")
    return run_cases(Worker.local(config.for_worker()), CASES)


@pytest.fixture(scope="module")
def on_ranks(tiny: tuple[Path, Any]) -> dict[str, Outcome]:
    """One set of processes runs all layouts, all methods at once in each."""
    num_ranks = max(layout.world_size for layout in LAYOUTS.values())
    task = partial(run_all_layouts, tiny[0], CASES)
    joined = {name: Outcome() for name in LAYOUTS}
    for found in run_ranks(task, num_ranks, len(LAYOUTS)):
        for name, outcome in found.items():
            joined[name].join(outcome)
    return joined


@pytest.mark.parametrize(
    ("method", "stage", "arrangement"), RUNS, ids=["-".join(run) for run in RUNS]
)
def test_rows_and_tokens_are_those_of_the_definition(
    method: str, stage: str, arrangement: str, oracle: Oracle, request: pytest.FixtureRequest
) -> None:
    if arrangement in LAYOUTS:
        outcome: Outcome = request.getfixturevalue("on_ranks")[arrangement]
    else:
        outcome = request.getfixturevalue(arrangement)
    mine = [case for case in CASES if (case.method, case.stage_name) == (method, stage)]
    assert mine
    for number, case in enumerate(mine):
        slow = oracle.know(case)
        closest = slow.cuts.closest
        assert closest > NEAR_CUT, "rounding decides what is kept: take another prompt"
        assert outcome.tokens[case] == oracle.tokens[case]
        expected = {row: held for row, held in oracle.rows.items() if row[0] == case}
        assert {row for row in outcome.rows if row[0] == case} == set(expected)
        for row, held in expected.items():
            got = outcome.rows[row]
            assert got.shape == held.shape, row[1:]
            np.testing.assert_allclose(got, held, atol=TOLERANCE, rtol=1e-4, err_msg=str(row[1:]))
        if stage == "slack":
            assert slow.num_compactions == NUM_COMPACTIONS[number]
        elif stage != "prefill":
            assert min(slow.num_trims) >= 1


@pytest.mark.parametrize("stage", ["published", "stored"])
def test_a_replay_ends_as_the_definition_says(
    stage: str, oracle: Oracle, tiny: tuple[Path, Any]
) -> None:
    """After a preemption, with the remembered queries and normalisers made anew."""
    methods = ("pyramidinfer", "pyramidinfer-13b")
    cases = [case for case in CASES if case.stage_name == stage and case.method in methods]
    for case in cases:
        oracle.know(case)
    worker = Worker.local(config_of(tiny[0], MeshLayout(), len(cases)).for_worker())
    outcome = replay_cases(worker, cases, oracle.tokens)
    for case in cases:
        fed = case.stage.num_steps
        assert outcome.tokens[case] == oracle.tokens[case][fed // 2 :]
        for layer, head in np.ndindex(LAYERS, HEADS):
            got, held = (found.rows[case, fed, layer, head] for found in (outcome, oracle))
            np.testing.assert_allclose(got, held, atol=TOLERANCE, rtol=1e-4)


def test_the_cases_show_something(oracle: Oracle) -> None:
    """All but `full` drop tokens; heads that compete or have a profile differ."""
    for name, row in METHODS.items():
        [case] = [case for case in CASES if case.method == name and case.stage_name == "prefill"]
        oracle.know(case)
        kept = np.array(
            [
                [len(oracle.rows[case, 0, layer, head]) for head in range(HEADS)]
                for layer in range(LAYERS)
            ]
        )
        assert (kept.sum() < LAYERS * HEADS * len(case.prompt)) == (name != "full")
        assert (kept != kept[:, :1]).any() == (row.rules.compete or "profile" in row.settings)
        if row.budgeted and "propagate" not in row.settings:
            assert kept.sum() == LAYERS * HEADS * case.retention.budget_of(len(case.prompt))


def test_every_preset_score_and_shape_has_a_row() -> None:
    presets = {file.stem for file in (CONFIG_DIR / "retention").glob("*.yaml")}
    assert presets - METHODS.keys() == set(), "no row in tests/support/methods.py"
    rows = [row.retention(name, PREFILL) for name, row in METHODS.items()]
    scores = {None if row.score is None else row.score.name for row in rows}
    assert scores == {None, *SCORES}
    assert {row.shape.name for row in rows} == set(SHAPES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DECODE_STAGES)
def test_decode_stages_that_a_row_does_not_name_are_refused(method: str, name: str) -> None:
    """A method that learns to drop tokens while decoding fails here until its row says so."""
    row, stage = METHODS[method], DECODE_STAGES[name][0]
    if name in row.decode:
        assert row.retention(method, stage).decode is not None
    else:
        with pytest.raises(ValueError, match="decode"):
            row.retention(method, stage)


def test_the_model_is_the_one_that_the_table_is_for(tiny: tuple[Path, Any]) -> None:
    config = tiny[1].config
    sizes = (config.num_hidden_layers, config.num_key_value_heads, config.num_attention_heads)
    assert sizes == (LAYERS, HEADS, QUERY_HEADS)

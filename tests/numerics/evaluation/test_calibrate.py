"""Calibration finds which heads a model needs: a head whose output goes nowhere matters nothing."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import save_tiny

from saqqara.compression.profiles.head_profile import HeadProfile
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.calibrate import (
    Calibration,
    combine,
    importances,
    without_row,
    write_profile,
)
from saqqara.evaluation.session import Session
from saqqara.evaluation.tasks.divergence import TOP_TOKENS, divergence

NUM_LAYERS, NUM_HEADS, GROUP, HEAD_DIM = 3, 3, 2, 16
MUTE = 1, 2  # layer, kv head


def test_a_mute_head_has_no_importance(tmp_path: Path, demo_model: Path) -> None:
    model = save_tiny("llama-gqa", tmp_path, tokenizer_of=demo_model)
    layer, head = MUTE
    with torch.no_grad():  # its two query heads no longer reach the hidden states
        columns = slice(GROUP * head * HEAD_DIM, GROUP * (head + 1) * HEAD_DIM)
        model.model.layers[layer].self_attn.o_proj.weight[:, columns] = 0
    model.save_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    contexts, continuations = (generator.integers(0, 999, (2, n)).tolist() for n in (420, 8))
    cuts = [
        without_row(row, NUM_LAYERS, NUM_HEADS, GROUP, 420) for row in range(NUM_LAYERS * NUM_HEADS)
    ]
    config = EngineConfig(model=str(tmp_path), dtype="float32", kv_memory_gib=0.1, max_num_seqs=16)
    with Session(config, cuts) as session:
        found = importances(session, contexts, continuations).reshape(NUM_LAYERS, NUM_HEADS)
    assert found[MUTE] == pytest.approx(0, abs=1e-9)
    found[MUTE] = np.inf
    assert found.min() > 1e-6


@pytest.mark.parametrize("row", [0, 5, 89])
def test_one_row_is_cut_and_the_others_are_whole(row: int) -> None:
    kept = without_row(row, 30, 3, 3, 2048).row_tokens(2048, 30, 3).reshape(-1)
    assert 102 <= kept[row] < 102 + 90  # the 20th part, and what makes the mean an integer
    assert (np.delete(kept, row) == 2048).all()


def test_divergence_tells_apart_what_both_list() -> None:
    full = {7: math.log(0.5), 3: math.log(0.25), 9: math.log(0.125)}
    other = {3: math.log(0.5), 7: math.log(0.25), 4: math.log(0.125)}
    # Tokens 7 and 3, and all others: 0.5, 0.25, 0.25 against 0.25, 0.5, 0.25.
    assert divergence(full, other) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert divergence(full, full) == 0
    assert divergence(full, {1: math.log(0.9)}) == 0  # nothing shared: one outcome


def test_divergence_bounds_that_of_the_whole_vocabulary_from_below() -> None:
    generator = np.random.default_rng(0)
    for spread in (0.1, 1.0, 3.0):
        logits = 3 * generator.standard_normal(400)
        p, q = (
            np.exp(x) / np.exp(x).sum() for x in (logits, logits + spread * generator.random(400))
        )
        best = [{int(i): math.log(x[i]) for i in np.argsort(-x)[:TOP_TOKENS]} for x in (p, q)]
        whole = float((p * np.log(p / q)).sum())
        assert 0 < divergence(*best) < whole
        everything = [dict(enumerate(np.log(x).tolist())) for x in (p, q)]
        assert divergence(*everything) == pytest.approx(whole, abs=1e-5)


def test_both_kinds_count_by_their_shares() -> None:
    texts, needles = np.array([1.0, 0.0, 3.0]), np.array([0.0, 50.0, 50.0])
    combined = combine(texts, needles)
    assert combined.sum() == pytest.approx(1)
    shares = np.array([0.8 * 0.25, 0.2 * 0.5, 0.8 * 0.75 + 0.2 * 0.5])
    assert combined == pytest.approx(shares**0.85 / (shares**0.85).sum())
    assert combine(10 * texts, needles) == pytest.approx(combined)


def test_a_written_profile_reads_back(tmp_path: Path) -> None:
    profile = HeadProfile(((0.25, 0.5), (0.125, 0.0625)))
    write_profile(profile, tmp_path / "new" / "profile.json")
    assert HeadProfile.read(tmp_path / "new" / "profile.json") == profile


def test_the_shipped_profile_is_found_by_its_name() -> None:
    retention = Retention.parse("recommended", "25%")
    assert retention.profile == HeadProfile.read("SmolLM2-135M-Instruct")
    kept = retention.row_tokens(2048, 30, 3)
    assert kept.sum() == 30 * 3 * 512
    assert kept.max() > 4 * kept.min()
    with pytest.raises(ValueError, match=r"no profile of this model of 32 layers .* calibrate"):
        retention.row_tokens(2048, 32, 8)


def test_short_contexts_are_refused(demo_model: Path) -> None:
    with pytest.raises(ValueError, match="context_tokens: must be at least 420, not 100"):
        Calibration(context_tokens=100).run(EngineConfig(model=str(demo_model)))

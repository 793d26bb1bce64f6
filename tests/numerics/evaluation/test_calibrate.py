"""Calibration finds which heads a model needs: a head whose output goes nowhere matters nothing."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import save_tiny

from saqqara.cluster.presets import ModelPresets
from saqqara.compression.layers import Layers
from saqqara.compression.profiles.fingerprint import weights_digest
from saqqara.compression.profiles.head_profile import HeadProfile
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.calibrate import (
    Calibration,
    combine,
    importances,
    without_row,
)
from saqqara.evaluation.calibrated import calibrate_model
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
    rows = np.ndindex(NUM_LAYERS, NUM_HEADS)
    cuts = [without_row(row, NUM_LAYERS, NUM_HEADS, GROUP, 420) for row in rows]
    config = EngineConfig(model=str(tmp_path), dtype="float32", kv_memory_gib=0.1, max_num_seqs=16)
    with Session(config, cuts) as session:
        found = importances(session, contexts, continuations).reshape(NUM_LAYERS, NUM_HEADS)
    assert found[MUTE] == pytest.approx(0, abs=1e-9)
    found[MUTE] = np.inf
    assert found.min() > 1e-6


@pytest.mark.parametrize("row", [(0, 0), (1, 2), (29, 2)])
def test_one_row_is_cut_and_the_others_are_whole(row: tuple[int, int]) -> None:
    kept = without_row(row, 30, 3, 3, 2048).row_tokens(2048, 30, 3).copy()
    assert 102 <= kept[row] < 102 + 90  # the 20th part, and what makes the mean an integer
    kept[row] = 2048
    assert (kept == 2048).all()


def test_of_local_layers_only_the_windows_stay_whatever_is_cut() -> None:
    layers = Layers((512, 0, 512, 0))
    kept = without_row((3, 1), layers, 2, 2, 2048).row_tokens(2048, layers, 2)
    assert kept[:3].tolist() == [[512, 512], [2048, 2048], [512, 512]]
    assert kept[3, 0] == 2048
    assert 102 <= kept[3, 1] < 102 + 4


def test_a_calibrated_model_is_found_by_its_weights(tmp_path: Path, demo_model: Path) -> None:
    """From `saqqara eval calibrate` to `recommended`, on a copy of the model in another folder."""
    folder, store = tmp_path / "tiny", tmp_path / "store"
    save_tiny("llama-gqa", folder, tokenizer_of=demo_model)
    config = EngineConfig(
        model=str(folder), dtype="float32", kv_memory_gib=0.1, profile_dir=str(store)
    )
    calibration = Calibration(context_tokens=420, continuation_tokens=4, num_samples=1)
    file = calibrate_model(calibration, config, None)
    assert file.parent == store
    stored = json.loads(file.read_text())
    assert stored["measured"]["model"] == "tiny"
    assert stored["fingerprint"] == weights_digest(folder) == file.stem
    copied = shutil.copytree(folder, tmp_path / "copied")
    found = ModelPresets(str(copied), profile_dir=str(store)).resolve(
        Retention.parse("recommended", "25%")
    )
    assert found.profile == HeadProfile.read(file)
    assert found.label == "recommended@25%"


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


def test_the_shipped_profile_is_found_by_the_demo_models_weights(demo_model: Path) -> None:
    presets = ModelPresets(str(demo_model))
    retention = presets.resolve(Retention.parse("recommended", "25%"))
    assert retention.profile == HeadProfile.read("SmolLM2-135M-Instruct")
    fast = presets.resolve(Retention.parse("recommended-fast", "25%"))
    assert fast.propagate is not None
    assert (fast.propagate.layer, fast.label) == (15, "recommended-fast@25%")
    kept = retention.row_tokens(2048, 30, 3)
    assert kept.sum() == 30 * 3 * 512
    assert kept.max() > 4 * kept.min()
    with pytest.raises(ValueError, match=r"no profile of this model of 32 layers .* calibrate"):
        retention.row_tokens(2048, 32, 8)


def test_short_contexts_are_refused(demo_model: Path) -> None:
    with pytest.raises(ValueError, match="context_tokens: must be at least 420, not 100"):
        Calibration(context_tokens=100).run(EngineConfig(model=str(demo_model)))

"""What `benchmarks/long_generation.py` says of row lengths and agreement, on a tiny model.

The scripts in `benchmarks/` find each other by their folder, so it joins the path for this file.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import save_tiny

from saqqara.cluster.request import RequestMetrics, ScoreOutput
from saqqara.compression.scores import SCORES


@pytest.fixture(scope="module")
def script() -> Any:
    return importlib.import_module("long_generation")


def test_every_score_with_a_decode_stage_is_measured(script: Any) -> None:
    settings = script.settings(script.METHODS, 64, 2, script.TRIGGERS)
    assert settings[0].label == "full"
    able = {name for name, method in SCORES.items() if method.at_decode is not None}
    assert {one.to_dict().get("score") for one in settings} == able | {None}
    stages = [one.decode.label for one in settings[1:]]
    assert stages == ["2"] * len(script.METHODS) + ["published", "stored"]


def test_rows_are_watched_step_by_step(script: Any, tmp_path: Path, demo_model: Path) -> None:
    save_tiny("llama-gqa", tmp_path, tokenizer_of=demo_model)
    methods = ("snapkv", "h2o", "ada-pyramidkv")
    settings = script.settings(methods, 64, 1, script.TRIGGERS)
    bench = script.Bench(str(tmp_path), 1, len(settings), 150)
    prompt = np.random.default_rng(0).integers(20, 40_000, 100).tolist()
    answer: list[int] = []
    for tokens in bench.generate(prompt, 50):
        answer = list(tokens)
    assert len(answer) == 50
    scores: dict[str, ScoreOutput] = {}
    for done in bench.feed(prompt, answer, settings):
        scores |= done
    tracks = bench.executor.tracks
    assert all(track.num_fed == 49 for track in tracks.values())  # nothing follows the last one
    full, *cut = script.outcomes(settings, tracks, scores)
    assert (full.mean_length, full.longest, full.limit, full.top1) == (149, 149, None, 1.0)
    for one in cut[:3]:
        # 49 tokens, a slack of 16: three compactions, and one more token.
        assert (one.mean_length, one.over_target, one.limit) == (65, 16, 32)
        assert one.longest >= 80
    assert all(one.limit is None and one.mean_length < 149 for one in cut[3:])
    script.plot(tmp_path / "plot.png", [full, *cut])
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    slot = next(slot for slot, label in bench.executor._labels.items() if label == cut[0].label)
    with pytest.raises(RuntimeError, match="outgrew its target by 33 tokens"):
        bench.executor._see(slot, tracks[cut[0].label].targets + 33, 1)
    bench.close()


def test_agreement_is_counted_where_full_holds_the_token_most_likely(script: Any) -> None:
    settings = script.settings(("knorm",), 64, 1, ())
    metrics = RequestMetrics(0.0)
    ranks = {"full": (1, 1, 2, 1), settings[1].label: (1, 5, 1, 2)}
    logprobs = {"full": (-1.0, -1.0, -1.0, -1.0), settings[1].label: (-1.0, -3.0, -1.0, -2.0)}
    scores = {
        label: ScoreOutput("", None, (), (7,) * 4, logprobs[label], ranks[label], metrics)
        for label in ranks
    }
    tracks = {label: script.Track(None, 0) for label in ranks}
    full, knorm = script.outcomes(settings, tracks, scores)
    assert (full.top1, full.logprob_difference) == (1.0, 0.0)
    assert knorm.top1 == pytest.approx(1 / 3)
    assert knorm.halves == (0.5, 0.0)
    assert knorm.logprob_difference == -0.75

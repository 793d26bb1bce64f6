"""Factors that are fitted to a run give that run back, and say how long others take."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saqqara.cluster.batch.summary import BatchSummary
from saqqara.cluster.engine.report import EngineReport, WorkerReport
from saqqara.cluster.planning.calibration import MeasuredRun, calibrate, read_run
from saqqara.cluster.planning.cost_model import Factors
from saqqara.cluster.planning.devices import Device
from saqqara.cluster.planning.memory import EngineSizes
from saqqara.cluster.planning.models import PlannedModel, model_of
from saqqara.cluster.planning.planner import DTYPES, Question, plan
from saqqara.cluster.planning.workload import Workload
from saqqara.compression.retention import Retention

SMOL = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# The machine of docs/performance.md: what it reads and multiplies at most, in the middle.
HOST = Device("host", 14, bandwidth=54e9, flops=890e9, link_bandwidth=5e9, kind="cpu")
BEFORE = Factors.default("cpu")
# And what was measured on it: requests, tokens in and out, wall and prefill seconds; full and 25%.
MEASURED = {
    "W1": ((16, 512, 128), (5.5, 2.6), (5.1, 2.7)),
    "W2": ((16, 2048, 128), (17.2, 12.6), (15.6, 12.7)),
    "W4": ((32, 1024, 256), (23.3, 10.7), (19.1, 11.0)),
    "W3": ((8, 6144, 256), (40.1, 28.4), (33.8, 27.7)),
}


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    folder = tmp_path_factory.mktemp("smol")
    (folder / "config.json").write_text(json.dumps(SMOL), encoding="utf-8")
    return model_of(str(folder))


def run_json(
    requests: int, prompt_tokens: int, new_tokens: int, wall: float, prefill: float
) -> dict[str, Any]:
    """What `saqqara bench throughput --json` writes of such a run, as far as it is read."""
    report = {
        "requests": {"length": requests},
        "prompt_tokens": requests * prompt_tokens,
        "generation_tokens": requests * new_tokens,
        "num_running_peak": requests,
        "num_steps": new_tokens + 8,
        "prefill_seconds": prefill,
        "phase_seconds": {"total": wall, "prefill": prefill},
        "wall_seconds": wall,
        "workers": [
            {
                "pipeline_rank": 0,
                "tensor_rank": 0,
                "dtype": "bfloat16",
                "page_tokens": 16,
                "attention_backend": "native",
                "layers": [0, SMOL["num_hidden_layers"]],
                "kv_heads": [0, SMOL["num_key_value_heads"]],
                "device": "cpu",
            }
        ],
    }
    return {"report": report, "config": {"retention": "full", "budget": None}}


def measured(name: str) -> MeasuredRun:
    sizes, full, _ = MEASURED[name]
    return MeasuredRun.of(run_json(*sizes, *full), name)


def predicted(model: PlannedModel, factors: Factors, name: str, retention: Retention) -> float:
    requests, prompt_tokens, new_tokens = MEASURED[name][0]
    question = Question(
        model=model,
        device=HOST,
        num_gpus=1,
        num_nodes=1,
        workload=Workload(prompt_tokens, new_tokens, retention),
        dtype=DTYPES["bfloat16"],
        sizes=EngineSizes(8192, 64, kv_memory_gib=4),
        factors=factors,
        num_requests=requests,
    )
    [only] = plan(question)
    assert only.job_seconds is not None
    return only.job_seconds


def test_the_run_itself_is_given_back(smol: PlannedModel) -> None:
    """But for how prompts of one length share their groups, which the planner does not round."""
    for name, (_, (wall, _), _) in MEASURED.items():
        factors = calibrate([measured(name)], smol, HOST, BEFORE)
        assert predicted(smol, factors, name, Retention.parse(None)) == pytest.approx(
            wall, rel=0.02
        )


@pytest.mark.parametrize("name", MEASURED)
def test_one_run_says_how_long_others_take(name: str, smol: PlannedModel) -> None:
    """From 512 tokens in to 6,144, and from full retention to a quarter: within 15%."""
    factors = calibrate([measured("W1")], smol, HOST, BEFORE)
    _, (full, _), (quarter, _) = MEASURED[name]
    kept = Retention.parse("pyramidkv", "25%")
    assert predicted(smol, factors, name, Retention.parse(None)) == pytest.approx(full, rel=0.15)
    assert predicted(smol, factors, name, kept) == pytest.approx(quarter, rel=0.15)


def test_two_runs_tell_attention_from_the_rest(smol: PlannedModel) -> None:
    """Runs that the cost model itself made give its factors back."""
    true = replace(BEFORE, prefill_linear=0.5, prefill_attention=0.3, decode_linear=0.4)
    true = replace(true, decode_attention=0.6, step_seconds=0.0)
    runs = []
    for prompt_tokens, new_tokens in ((512, 128), (4096, 128)):
        question = Question(
            model=smol,
            device=HOST,
            num_gpus=1,
            num_nodes=1,
            workload=Workload(prompt_tokens, new_tokens, Retention.parse(None)),
            dtype=DTYPES["bfloat16"],
            sizes=EngineSizes(8192, 16, max_prefill_tokens=4096, kv_memory_gib=4),
            factors=replace(true, layer_seconds=1e-12),
        )
        [only] = plan(question)
        assert only.kept is not None
        prefill = 16 * prompt_tokens / only.kept.prefill_tokens_per_second
        wall = prefill + only.kept.step_seconds * (new_tokens - 1)
        data = run_json(16, prompt_tokens, new_tokens, wall, prefill)
        runs.append(MeasuredRun.of(data, "run"))
    found = calibrate(runs, smol, HOST, replace(BEFORE, layer_seconds=1e-12))
    assert found.prefill_linear == pytest.approx(0.5, rel=0.01)
    assert found.prefill_attention == pytest.approx(0.3, rel=0.01)
    assert found.decode_linear == pytest.approx(0.4, rel=0.01)
    assert found.decode_attention == pytest.approx(0.6, rel=0.01)


def test_a_summary_of_a_batch_job_does_as_well(tmp_path: Path) -> None:
    data = run_json(16, 512, 128, 5.5, 2.6)
    summary = {"retention": "pyramidkv", "budget": "25%", "report": data["report"]}
    file = tmp_path / "answers.jsonl.summary.json"
    file.write_text(json.dumps(summary), encoding="utf-8")
    run = read_run(file)
    assert run.workload == Workload(512, 128, Retention.parse("pyramidkv", "25%"))
    assert (run.steps, run.num_seqs, run.num_requests) == (127, 16, 16)


def test_what_is_read_of_a_report_is_in_every_report() -> None:
    report = run_json(1, 1, 2, 1.0, 0.5)["report"]
    assert set(report) <= set(EngineReport.model_fields)
    assert set(report["workers"][0]) <= set(WorkerReport.model_fields)
    assert {"retention", "budget", "report"} <= set(BatchSummary.model_fields)


def test_attention_of_torch_is_expected_to_reach_less(smol: PlannedModel) -> None:
    """So of two runs that took the same, the one of torch leaves less for the linear layers."""
    data = run_json(16, 512, 128, 22.0, 10.4)
    ours, torchs = (Factors.default("cpu", name) for name in ("native", "torch"))
    assert ours == BEFORE
    assert MeasuredRun.of(data, "run").attention_backend == "native"
    run = MeasuredRun.of(data, "run")
    native, torch = (calibrate([run], smol, HOST, before) for before in (ours, torchs))
    assert torch.decode_attention < native.decode_attention
    assert torch.decode_linear > native.decode_linear
    assert torch.prefill_linear > native.prefill_linear


def test_what_the_controller_takes_is_told_apart(smol: PlannedModel) -> None:
    data = run_json(16, 512, 128, 5.5, 2.6)
    data["report"]["wall_seconds"] = 5.5 + 136 * 0.004
    factors = calibrate([MeasuredRun.of(data, "run")], smol, HOST, BEFORE)
    assert factors.step_seconds == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"report": None}, "run.json is no run of `saqqara bench throughput --json`"),
        ({"prefill_seconds": 0.0}, "has no prefill or no decode steps"),
        ({"generation_tokens": 16}, "has no prefill or no decode steps"),
        ({"prefill_seconds": 1e-9}, "prefill would reach .* are the runs of this model"),
        ({"device": "cuda:0"}, "a run on 'cuda' says nothing about .* of kind 'cpu'"),
        ({"layers": [0, 3]}, "a run of a model with 3 layers and .* kv heads is not of"),
        ({"kv_heads": [0, 8]}, "layers and 8 kv heads is not of"),
        ({"dtype": "int8"}, "no run of .*: it lacks 'int8'"),
    ],
    ids=str,
)
def test_runs_that_say_nothing(
    change: dict[str, Any], message: str, smol: PlannedModel, tmp_path: Path
) -> None:
    data = run_json(16, 512, 128, 5.5, 2.6)
    if "report" in change:
        data["report"] = change["report"]
    elif change.keys() <= data["report"]["workers"][0].keys():
        data["report"]["workers"][0].update(change)
    else:
        data["report"].update(change)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        calibrate([read_run(file)], smol, HOST, BEFORE)


def test_runs_of_several_ranks_are_refused(smol: PlannedModel) -> None:
    data = run_json(16, 512, 128, 5.5, 2.6)
    data["report"]["workers"][0]["pipeline_rank"] = 1
    with pytest.raises(ValueError, match="runs of one rank"):
        calibrate([MeasuredRun.of(data, "run")], smol, HOST, BEFORE)

"""Fits the cost model's factors to measured runs.

A run is the JSON of `saqqara bench throughput --json`, or the summary of `saqqara batch`: what was
asked, and the worker's seconds in prefill and beside it. From one run the factors of the linear
layers follow, those of attention being as before; several runs that differ in lengths or budgets
give both (least squares of relative errors).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from saqqara.compression.retention import Retention
from saqqara.workers.footprint import Footprint
from saqqara.workers.mesh.layout import MeshLayout

from .cost_model import CostModel, Factors, Terms
from .devices import Device
from .models import PlannedModel
from .workload import Workload

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LEAST, _MOST = 0.01, 2.0  # beyond it a run is of another device or model
_APART = 0.02  # how much two runs must differ in the part of attention to tell it from the rest


@dataclass(frozen=True, slots=True)
class _Size:
    itemsize: int


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """One engine's run over prompts of about one length, as its report has it.

    Attributes:
        workload: mean lengths, and the retention.
        num_requests: that were answered.
        layout: of the engine's ranks.
        dtype_bytes: of a weight.
        page_tokens: of a page.
        attention_backend: that computed it.
        num_layers: of the model.
        num_kv_heads: of the model.
        device_kind: "cuda" or "cpu".
        steps: decode steps, as few as the sequences that ran at once allow.
        num_seqs: sequences in each of them, on average.
        prefill_seconds: in prefill, the slowest worker of each step.
        decode_seconds: of the workers in everything else.
        idle_seconds: of the controller in a step, while no worker computes.
    """

    workload: Workload
    num_requests: int
    layout: MeshLayout
    dtype_bytes: int
    page_tokens: int
    attention_backend: str
    num_layers: int
    num_kv_heads: int
    device_kind: str
    steps: float
    num_seqs: float
    prefill_seconds: float
    decode_seconds: float
    idle_seconds: float

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str) -> "MeasuredRun":
        """Read a run's JSON.

        Raises:
            ValueError: it is no such JSON, or the run had no decode step.
        """
        try:
            report, settings = data["report"], data.get("config") or data
            requests = sum(report["requests"].values())
            retention = Retention.parse(settings["retention"], settings["budget"])
            fed = report["generation_tokens"] - requests
            peak, workers = report["num_running_peak"], report["workers"]
            total = report["phase_seconds"]["total"]
            prefill, num_steps = report["prefill_seconds"], report["num_steps"]
            wall = report["wall_seconds"]
            ranks = [(w["pipeline_rank"] + 1, w["tensor_rank"] + 1) for w in workers]
            dtype, page_tokens = workers[0]["dtype"], workers[0]["page_tokens"]
            attention_backend = workers[0]["attention_backend"]
            prompt_tokens = report["prompt_tokens"]
            num_layers = max(w["layers"][1] for w in workers)
            num_kv_heads = max(w["kv_heads"][1] for w in workers)
            device_kind = workers[0]["device"].partition(":")[0]
            dtype_bytes = _DTYPE_BYTES[dtype]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"calibrate: {where} is no run of `saqqara bench throughput --json` or "
                f"`saqqara batch`: {what}"
            ) from None
        if requests < 1 or fed < 1 or prefill <= 0 or total <= prefill:
            raise ValueError(f"calibrate: {where} has no prefill or no decode steps")
        new_tokens = 1 + max(round(fed / requests), 1)
        steps = max(fed / peak, float(new_tokens - 1))
        return cls(
            workload=Workload(round(prompt_tokens / requests), new_tokens, retention),
            num_requests=requests,
            layout=MeshLayout(max(t for _, t in ranks), max(p for p, _ in ranks)),
            dtype_bytes=dtype_bytes,
            page_tokens=page_tokens,
            attention_backend=attention_backend,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            device_kind=device_kind,
            steps=steps,
            num_seqs=fed / steps,
            prefill_seconds=prefill,
            decode_seconds=total - prefill,
            idle_seconds=max(wall - total, 0.0) / max(num_steps, 1),
        )


def read_run(path: Path) -> MeasuredRun:
    """A run's file.

    Raises:
        ValueError: it cannot be read, or is no run.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"calibrate: cannot read {path}: {error}") from None
    except RecursionError:
        raise ValueError(f"calibrate: {path} is nested too deep") from None
    if not isinstance(data, dict):
        raise ValueError(f"calibrate: {path} holds no JSON object")
    return MeasuredRun.of(data, str(path))


def calibrate(
    runs: Sequence[MeasuredRun], model: PlannedModel, device: Device, before: Factors
) -> Factors:
    """The factors under which the cost model gives what these runs took.

    Raises:
        ValueError: a run has several ranks, or is of another model or device.
    """
    assert runs, "nothing to calibrate with"
    if any(run.layout.world_size > 1 for run in runs):
        raise ValueError("calibrate: it takes runs of one rank (the local executor)")
    for run in runs:
        _check_alike(run, model, device)
    parts = [_parts(run, model, device, before) for run in runs]
    prefill = _fit([p.prefill for p in parts], before.prefill_linear, before.prefill_attention)
    decode = _fit([p.decode for p in parts], before.decode_linear, before.decode_attention)
    for name, share in zip(("prefill", "decode"), (prefill[0], decode[0]), strict=True):
        if not _LEAST <= share <= _MOST:
            raise ValueError(
                f"calibrate: {name} would reach {share:.1%} of what {device.name} can do with "
                f"{model.name}; are the runs of this model on such a device?"
            )
    return replace(
        before,
        prefill_linear=prefill[0],
        prefill_attention=prefill[1],
        decode_linear=decode[0],
        decode_attention=decode[1],
        step_seconds=float(np.mean([run.idle_seconds for run in runs])),
    )


def _check_alike(run: MeasuredRun, model: PlannedModel, device: Device) -> None:
    """Raise a ValueError unless a run can be of this model on this kind of device."""
    if run.device_kind != device.kind:
        raise ValueError(
            f"calibrate: a run on {run.device_kind!r} says nothing about {device.name}, "
            f"which is of kind {device.kind!r}"
        )
    of_run, of_model = (
        (run.num_layers, run.num_kv_heads),
        (model.spec.num_layers, model.spec.num_kv_heads),
    )
    if of_run != of_model:
        raise ValueError(
            f"calibrate: a run of a model with {of_run[0]} layers and {of_run[1]} kv heads is not "
            f"of {model.name}, which has {of_model[0]} and {of_model[1]}"
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Seconds at the device's limits, and what was measured less what no factor changes."""

    linear: float
    attention: float
    measured: float


@dataclass(frozen=True, slots=True)
class _Parts:
    prefill: _Part
    decode: _Part


def _parts(run: MeasuredRun, model: PlannedModel, device: Device, before: Factors) -> _Parts:
    spec, workload = model.spec, run.workload
    [rank] = Footprint.of_ranks(spec, _Size(run.dtype_bytes), run.layout)
    cost = CostModel(model, device, before)
    group = max(2048, workload.prompt_tokens)
    attended = float(workload.attended_tokens(spec, run.page_tokens).sum())
    prefill = cost.prefill_terms(rank, workload.entering_tokens(spec), group)
    decode = cost.decode_terms(rank, run.num_seqs, attended)

    launches = spec.num_layers * before.layer_seconds if device.kind == "cpu" else 0.0
    groups = run.num_requests * workload.prompt_tokens / group
    return _Parts(
        _part(prefill, run.num_requests, run.prefill_seconds, groups * launches),
        _part(decode, run.steps, run.decode_seconds, run.steps * launches),
    )


def _part(terms: Terms, times: float, seconds: float, launched: float) -> _Part:
    """So many times these terms, and the seconds that they took; launching is never all of them."""
    measured = max(seconds - launched, seconds / 10)
    return _Part(terms.linear * times, terms.attention * times, measured)


def _fit(parts: Sequence[_Part], linear: float, attention: float) -> tuple[float, float]:
    """Shares of the limits of linear layers and attention; the ones before are given.

    Where attention alone would take longer than what was measured, both are changed alike.
    """
    rows = np.array([(p.linear, p.attention) for p in parts])
    rows /= np.array([[p.measured] for p in parts])
    mix = rows[:, 1] / rows.sum(axis=1)
    if len(parts) > 1 and float(np.ptp(mix)) > _APART:
        (x, y), *_ = np.linalg.lstsq(rows, np.ones(len(parts)), rcond=None)
        if x > 0 and y > 0:
            return float(1 / x), float(1 / y)
    left = 1 - rows[:, 1] / attention
    if (left > 0).all():
        return float(np.mean(rows[:, 0] / left)), attention
    both = float(np.mean(rows[:, 0] / linear + rows[:, 1] / attention))
    return linear * both, attention * both

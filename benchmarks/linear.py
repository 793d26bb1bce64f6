"""Milliseconds for all linear layers of a model: packed kernels, `F.linear`, oneDNN prepacked.

    python benchmarks/linear.py --rows 1 16 512 --json results/linear.json

`linear`, `oneDNN` and `packed` are the products alone; `fused` is what a decoder layer runs around
attention: norms, products, rotation, silu, residuals. `torch` is the same as `fused`, unfused.
Up to 64 rows the head (and its norm) is included, as in decoding; beyond, it is left out.

The ways take turns, layer by layer in the order of the model, so that weights come from memory.
Each call is timed by itself; a figure is the sum over the calls of their medians (or quartiles)
over the rounds, which a busy machine disturbs less than whole passes.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from saqqara.configs.json_text import json_text
from saqqara.workers.cgroups import usable_cores
from saqqara.workers.models.norm import rms_norm
from saqqara.workers.models.reading.rope_spec import RopeSpec
from saqqara.workers.models.rotary import RotaryTable, rotate
from saqqara.workers.native.decoder_layer import Finish, Mlp, Projection
from saqqara.workers.native.linear import PackedLinear, RMSNorm

Call = Callable[[], object]

# SmolLM2-135M.
LAYERS, HIDDEN, INNER, VOCAB = 30, 576, 1536, 49152
QUERY_HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
QKV = (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM
SHAPES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN)}
SHAPES |= {"gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}
EPS = 1e-5
MAX_HEAD_ROWS = 64
REST_SECONDS = 0.01  # before each pass: a process that has slept is not interrupted at once


@dataclass(frozen=True)
class Layer:
    """One layer's weights as read, and packed in every way."""

    norm: Tensor
    raw: dict[str, Tensor]
    packed: dict[str, PackedLinear]
    project: Projection
    finish: Finish


def make_layer(table: RotaryTable, seed: int) -> Layer:
    """Random weights that keep the size of activations."""
    generator = torch.Generator().manual_seed(seed)
    raw = {
        name: (torch.randn(shape, generator=generator) * shape[1] ** -0.5).bfloat16()
        for name, shape in SHAPES.items()
    }
    norm = torch.ones(HIDDEN).bfloat16()
    packed = {
        name: PackedLinear(
            weight,
            norm=RMSNorm(norm, EPS) if name in ("qkv", "gate_up") else None,
            gated="silu" if name == "gate_up" else None,
        )
        for name, weight in raw.items()
    }
    return Layer(
        norm,
        raw,
        packed,
        Projection(packed["qkv"], QUERY_HEADS, KV_HEADS, table.cos, table.sin),
        Finish(packed["o"], Mlp(packed["gate_up"], packed["down"])),
    )


class Model:
    """All layers and the head, and the calls of one pass of each way to run them."""

    def __init__(self) -> None:
        self.table = RotaryTable(RopeSpec(10000.0), HEAD_DIM, 8192)
        self.layers = [make_layer(self.table, seed) for seed in range(LAYERS)]
        self.norm = torch.ones(HIDDEN).bfloat16()
        self.head = (torch.randn(VOCAB, HIDDEN) * HIDDEN**-0.5).bfloat16()
        self.packed_head = PackedLinear(self.head)
        self.normed_head = PackedLinear(self.head, norm=RMSNorm(self.norm, EPS))

    def calls(self, rows: int) -> dict[str, list[Call]]:
        """The calls of a pass of each way with so many rows."""
        self.hidden = torch.randn(rows, HIDDEN).bfloat16()
        self.inner = torch.randn(rows, INNER).bfloat16()
        self.positions = torch.arange(rows)
        self.angles = self.table.lookup(self.positions)
        self.heads = [
            torch.empty(rows, n, HEAD_DIM).bfloat16() for n in (QUERY_HEADS, KV_HEADS, KV_HEADS)
        ]
        ways = {
            "linear": [call for layer in self.layers for call in self._linear(layer)],
            "oneDNN": [call for layer in self.layers for call in self._onednn(layer, rows)],
            "packed": [call for layer in self.layers for call in self._packed(layer)],
            "torch": [call for layer in self.layers for call in self._torch(layer)],
            "fused": [call for layer in self.layers for call in self._fused(layer)],
        }
        if rows <= MAX_HEAD_ROWS:
            ways["linear"].append(partial(linear, self.hidden, self.head))
            ways["oneDNN"].append(_onednn_call(self.hidden, self.head, rows))
            ways["packed"].append(partial(self.packed_head.logits, self.hidden))
            ways["torch"].append(self._torch_head)
            ways["fused"].append(partial(self.normed_head.logits, self.hidden))
        return ways

    def _inputs(self) -> dict[str, Tensor]:
        return {name: self.inner if name == "down" else self.hidden for name in SHAPES}

    def _linear(self, layer: Layer) -> list[Call]:
        return [partial(linear, x, layer.raw[name]) for name, x in self._inputs().items()]

    def _onednn(self, layer: Layer, rows: int) -> list[Call]:
        return [_onednn_call(x, layer.raw[name], rows) for name, x in self._inputs().items()]

    def _packed(self, layer: Layer) -> list[Call]:
        return [partial(layer.packed[name], x) for name, x in self._inputs().items()]

    def _fused(self, layer: Layer) -> list[Call]:
        q, k, v = self.heads
        return [
            partial(layer.project, self.hidden, self.positions, q, k, v),
            partial(layer.finish, self.hidden, q),
        ]

    def _torch(self, layer: Layer) -> list[Call]:
        return [partial(self._torch_project, layer), partial(self._torch_finish, layer)]

    def _torch_project(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        qkv = linear(rms_norm(self.hidden, layer.norm, EPS), layer.raw["qkv"])
        heads = qkv.view(-1, QUERY_HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = torch.split(heads, [QUERY_HEADS, KV_HEADS, KV_HEADS], dim=1)
        return rotate(q, *self.angles), rotate(k, *self.angles), v

    def _torch_finish(self, layer: Layer) -> Tensor:
        hidden = self.hidden + linear(self.heads[0].flatten(1), layer.raw["o"])
        gate_up = linear(rms_norm(hidden, layer.norm, EPS), layer.raw["gate_up"])
        gate, up = gate_up.chunk(2, dim=-1)
        return hidden + linear(silu(gate).mul_(up), layer.raw["down"])

    def _torch_head(self) -> Tensor:
        return linear(rms_norm(self.hidden, self.norm, EPS), self.head).float()


def _onednn_call(x: Tensor, weight: Tensor, rows: int) -> Call:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")


def measure(ways: dict[str, list[Call]], rounds: int) -> dict[str, list[float]]:
    """Lower quartile and median of each way, in ms."""
    seconds = {way: np.zeros((rounds, len(calls))) for way, calls in ways.items()}
    for round_ in range(-1, rounds):  # the first is for warming up
        for way, calls in ways.items():
            time.sleep(REST_SECONDS)
            for index, call in enumerate(calls):
                started = time.perf_counter()
                call()
                seconds[way][round_, index] = time.perf_counter() - started
    return {
        way: (np.quantile(times, [0.25, 0.5], axis=0).sum(axis=1) * 1e3).tolist()
        for way, times in seconds.items()
    }


def main() -> None:
    """Print the table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 512])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, help="default: 1000 / rows, at least 7, at most 30")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weight_bytes = 2 * (LAYERS * sum(n * k for n, k in SHAPES.values()) + VOCAB * HIDDEN)
    print(f"SmolLM2-135M, bf16, {weight_bytes / 1e6:.0f} MB, {options.threads} threads")
    print("ms: median (lower quartile)")
    results = []
    with torch.inference_mode():
        model = Model()
        for index, rows in enumerate(options.rows):
            ways = model.calls(rows)
            rounds = options.rounds or min(30, max(7, 1000 // rows))
            times = measure(ways, rounds)
            if index == 0:
                print(f"{'rows':>5}" + "".join(f"{way:>18}" for way in times))
            cells = "".join(f"{f'{mid:.1f} ({low:.1f})':>18}" for low, mid in times.values())
            print(f"{rows:5}{cells}", flush=True)
            results.append(
                {
                    "rows": rows,
                    "head_included": rows <= MAX_HEAD_ROWS,
                    "rounds": rounds,
                    "median_ms": {way: round(mid, 3) for way, (_, mid) in times.items()},
                    "quartile_ms": {way: round(low, 3) for way, (low, _) in times.items()},
                }
            )
    if options.json is not None:
        report = {
            "model": "SmolLM2-135M",
            "dtype": "bfloat16",
            "weight_bytes": weight_bytes,
            "threads": options.threads,
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
            "results": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json_text(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

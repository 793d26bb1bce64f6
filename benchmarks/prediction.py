"""What `saqqara plan` predicts for a machine from one run, beside what the machine then does.

    python benchmarks/prediction.py --json results/prediction.json

The runs are W1 (the one to calibrate with, on the local executor), W2, W4, W1 with a quarter of its
keys and values, and W1 on two pipeline stages. Each has an engine of its own, and the engines take
turns of `--turn-seconds`, the one that is furthest behind first: whatever else the machine does
meanwhile meets all of them alike. A run's time is that of its steps, the others' left out.

The cost model is calibrated with W1 alone and says how long the others take. The device is this
machine: what it reads and multiplies, how products of few rows take in their weights, what ranks
reach together, and what a layer takes that computes next to nothing are measured when the script
starts. The link between stages is stated (`LINK`); what crosses it is small. The exit code is 1 if
a prediction is off by more than `--limit`. `--share 0.25` takes a quarter of the requests of each
run, for a slow machine.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness.comma_lists import comma_list, one_of
from harness.limits import READ_BYTES, Call, make_limits, measure
from rich.console import Console
from rich.table import Table

from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.executor import Executor, LocalExecutor
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.planning.calibration import calibrate, read_run
from saqqara.cluster.planning.cost_model import Factors
from saqqara.cluster.planning.devices import GIB, Device
from saqqara.cluster.planning.memory import EngineSizes
from saqqara.cluster.planning.models import model_of
from saqqara.cluster.planning.planner import DTYPES, Question, plan
from saqqara.cluster.planning.workload import Workload
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.compression.retention import Retention
from saqqara.configs.json_text import json_text
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.speed.throughput import Workload as Prompts
from saqqara.workers.gguf.demo import fetch_demo_model
from saqqara.workers.host_memory import total_bytes
from saqqara.workers.models.choice import choose_linear_backend
from saqqara.workers.models.spec import load_spec

LINK_BANDWIDTH, LINK_SECONDS = 1e9, 1e-4  # TCP over loopback
GEMM_SIZE = 2048
LIMIT_ROUNDS = 9
FEW_ROWS, SEVERAL_ROWS = 2, 32  # between them a line says what the rows cost, and what the weights
THIN = {"hidden_size": 72, "intermediate_size": 64, "head_dim": 8}  # for 9 query heads
CALIBRATION = "W1"


@dataclass(frozen=True)
class Run:
    """A workload, and what it runs under."""

    name: str
    num_requests: int
    prompt_tokens: int
    new_tokens: int
    retention: str = "full"
    budget: str | None = None
    stages: int = 1


RUNS = (
    Run(CALIBRATION, 16, 512, 128),
    Run("W2", 16, 2048, 128),
    Run("W4", 32, 1024, 256),
    Run("W1@25%", 16, 512, 128, "pyramidkv", "25%"),
    Run("W1-PP2", 16, 512, 128, stages=2),
)


class Turns:
    """A run's engine, which computes only while it is its turn.

    With stages a step may go on a little after its turn, so turns are long beside steps.
    """

    def __init__(self, run: Run, config: EngineConfig) -> None:
        self.run, self.config = run, config
        self.seconds = 0.0
        self._executor = _executor(config)
        tokenizer, spec = Tokenizer.load(config.model), load_spec(config.model)
        self._engine = Engine(config, self._executor, tokenizer, spec)
        self._submit("warm up", 1, 64, 4)
        while self.take(1.0):
            pass
        self._engine.reset_stats()
        self._submit("run", run.num_requests, run.prompt_tokens, run.new_tokens)
        self.seconds = 0.0

    def take(self, seconds: float) -> bool:
        """Step for so long; whether there is more to do."""
        started = time.perf_counter()
        while self._engine.has_unfinished() and time.perf_counter() - started < seconds:
            self._engine.step()
        self.seconds += time.perf_counter() - started
        return self._engine.has_unfinished()

    def result(self) -> dict[str, Any]:
        """As `saqqara bench throughput --json` has it, the wall time without others' turns."""
        report = self._engine.report().model_copy(update={"wall_seconds": self.seconds})
        return {
            "wall_seconds": self.seconds,
            "config": self.config.model_dump(mode="json"),
            "report": report.model_dump(mode="json"),
        }

    def close(self) -> None:
        """End the engine and its ranks."""
        self._engine.shutdown()

    def _submit(self, name: str, num_requests: int, prompt_tokens: int, new_tokens: int) -> None:
        prompts = Prompts(None, num_requests, prompt_tokens).token_ids(self.config)
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            self._engine.add(Request(f"{name} {number}", prompt, sampling))


def _executor(config: EngineConfig) -> Executor:
    if config.executor == "local":
        return LocalExecutor(config)
    from saqqara.cluster.on_ray.controller import connect
    from saqqara.cluster.on_ray.executor import RayExecutor

    connect()
    return RayExecutor(config)


def measured_device(dtype: str, weights: torch.Tensor | None) -> Device:
    """This machine: a plain read of memory, and a large product in the engine's dtype.

    Args:
        dtype: of the engine.
        weights: matrices of the model's MLP, larger than the caches together, [N, F, E], where
            torch multiplies with them; None: our own kernels do, which read while they multiply.
    """
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(getattr(torch, dtype)) for _ in range(2))
    calls: dict[str, Call] = {"read": make_limits()["GB/s"][1], "product": lambda: a @ b}
    if weights is not None:
        calls |= product_calls(weights)
    times = measure(calls, LIMIT_ROUNDS)
    seconds = {name: median(times[name].seconds) for name in calls}
    device = Device(
        "this machine",
        memory_gib=total_bytes() / GIB,
        bandwidth=READ_BYTES / seconds["read"],
        flops=2 * GEMM_SIZE**3 / seconds["product"],
        link_bandwidth=LINK_BANDWIDTH,
        link_seconds=LINK_SECONDS,
        kind="cpu",
    )
    if weights is None:
        return device
    return replace(
        device,
        product_bandwidth=device.bandwidth * weights_share(seconds),
        together=seconds["all"] / seconds["parts"],
    )


def product_calls(weights: torch.Tensor) -> dict[str, Call]:
    """Products of one, few and several rows on one thread; of one on all, as one and in parts."""
    num_threads, parts = torch.get_num_threads(), weights.chunk(torch.get_num_threads())

    def multiply(rows: int, some: torch.Tensor) -> None:
        hidden = torch.ones(rows, weights.shape[-1], dtype=weights.dtype)
        with torch.inference_mode():
            for matrix in some:
                torch.nn.functional.linear(hidden, matrix)

    def on_one_thread(rows: int, some: torch.Tensor) -> None:
        torch.set_num_threads(1)
        multiply(rows, some)
        torch.set_num_threads(num_threads)

    def in_parts() -> None:
        torch.set_num_threads(1)  # a thread takes the number that is set when it starts
        threads = [threading.Thread(target=multiply, args=(1, part)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.set_num_threads(num_threads)

    return {
        "one row": lambda: on_one_thread(1, parts[0]),
        "few rows": lambda: on_one_thread(FEW_ROWS, parts[0]),
        "several rows": lambda: on_one_thread(SEVERAL_ROWS, parts[0]),
        "all": lambda: multiply(1, weights),
        "parts": in_parts,
    }


def weights_share(seconds: Mapping[str, float]) -> float:
    """How fast a product of several rows takes in its weights, beside one of one row."""
    few, several = seconds["few rows"], seconds["several rows"]
    row = (several - few) / (SEVERAL_ROWS - FEW_ROWS)
    one = seconds["one row"]
    return one / max(few - FEW_ROWS * row, one)


def mlp_weights(model: str, dtype: str) -> torch.Tensor | None:
    """Of the model's shape and of 128 MiB at least, where torch multiplies with them."""
    torch_dtype, spec = getattr(torch, dtype), load_spec(model)
    if choose_linear_backend("auto", torch.device("cpu"), torch_dtype, "cpu", spec)[0] != "torch":
        return None
    one = spec.intermediate_size * spec.hidden_size * torch_dtype.itemsize
    number = max(2 * torch.get_num_threads(), -(-READ_BYTES // one))
    return torch.randn(number, spec.intermediate_size, spec.hidden_size).to(torch_dtype)


def layer_seconds(run: Run, arguments: argparse.Namespace) -> float:
    """What a layer takes in a decode step of a model of the same depth that hardly computes."""
    with tempfile.TemporaryDirectory() as folder:
        for file in Path(arguments.model).glob("*.json"):
            shutil.copy(file, folder)
        settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        thin = Path(folder) / "config.json"
        thin.write_text(json.dumps(settings | THIN), encoding="utf-8")
        config = config_of(run, arguments)
        config = config.model_copy(update={"model": folder, "load_format": "dummy"})
        turns = Turns(replace(run, prompt_tokens=64, new_tokens=16), config)
        while turns.take(1.0):
            pass
        report = turns.result()["report"]
        turns.close()
    decoding = report["phase_seconds"]["total"] - report["prefill_seconds"]
    return float(decoding / report["num_steps"] / settings["num_hidden_layers"])


def config_of(run: Run, arguments: argparse.Namespace) -> EngineConfig:
    """The settings of a run's engine."""
    return EngineConfig(
        model=arguments.model,
        device="cpu",
        dtype=arguments.dtype,
        retention=run.retention,
        budget=run.budget,
        kv_memory_gib=arguments.kv_memory_gib,
        max_num_seqs=run.num_requests,
        executor="local" if run.stages == 1 else "ray",
        pipeline_parallel_size=run.stages,
        prefix_caching=False,
    )


def measure_runs(
    runs: Sequence[Run], expected: Sequence[float], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The JSON of every run, all of them in turns; `expected` seconds say who is behind."""
    console = Console(stderr=True)
    with ExitStack() as stack:
        engines = []
        for run in runs:
            engines.append(Turns(run, config_of(run, arguments)))
            stack.callback(engines[-1].close)
        share = dict(zip(engines, expected, strict=True))
        unfinished = list(engines)
        while unfinished:
            behind = min(unfinished, key=lambda each: each.seconds / share[each])
            if not behind.take(arguments.turn_seconds):
                unfinished.remove(behind)
                console.print(f"{behind.run.name}: {behind.seconds:.1f} s")
        return [each.result() for each in engines]


def predict(run: Run, factors: Factors, device: Device, arguments: argparse.Namespace) -> float:
    """Seconds that `saqqara plan --requests` gives a run."""
    model = model_of(arguments.model)
    retention = Retention.parse(run.retention, run.budget)
    most = model.spec.max_position
    [only] = plan(
        Question(
            model=model,
            device=device,
            num_gpus=run.stages,
            num_nodes=1,
            workload=Workload(run.prompt_tokens, run.new_tokens, retention),
            dtype=DTYPES[arguments.dtype],
            sizes=EngineSizes(most, run.num_requests, kv_memory_gib=arguments.kv_memory_gib),
            factors=factors,
            num_requests=run.num_requests,
            tensor=1,
            pipeline=run.stages,
        )
    )
    if only.job_seconds is None:
        raise RuntimeError(f"{run.name}: {only.why_not}")
    return only.job_seconds


def calibrated(
    result: dict[str, Any], device: Device, model: str, layer_seconds: float | None = None
) -> Factors:
    """Factors from the file of a run, as `--calibrate` reads it.

    `layer_seconds` is measured before; None: the default.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        file.write_text(json.dumps(result), encoding="utf-8")
        run = read_run(file)
    before = Factors.default(device.kind, run.attention_backend)
    if layer_seconds is not None:
        before = replace(before, layer_seconds=layer_seconds)
    return calibrate([run], model_of(model), device, before)


def errors(measured: Sequence[float], predicted: Sequence[float]) -> list[float]:
    """How far each prediction is off, as a share of what was measured."""
    return [p / m - 1 for m, p in zip(measured, predicted, strict=True)]


def main() -> int:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a model's folder; default: the demo model")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--share", type=float, default=1.0, help="of the requests of each run")
    parser.add_argument("--turn-seconds", type=float, default=3.0)
    parser.add_argument("--kv-memory-gib", type=float, default=2.0)
    parser.add_argument("--limit", type=float, default=0.15, help="an error that is too much")
    names = [run.name for run in RUNS]
    parser.add_argument(
        "--runs",
        type=comma_list(one_of(names), f"some of {', '.join(names)}"),
        help="names with commas between, besides W1; default: all",
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    arguments.model = arguments.model or str(fetch_demo_model())
    runs = [
        replace(run, num_requests=max(1, round(run.num_requests * arguments.share)))
        for run in RUNS
        if arguments.runs is None or run.name in (CALIBRATION, *arguments.runs)
    ]
    device = measured_device(arguments.dtype, mlp_weights(arguments.model, arguments.dtype))
    before = Factors.default(device.kind)
    expected = [predict(run, before, device, arguments) for run in runs]
    launching = layer_seconds(runs[0], arguments)
    results = measure_runs(runs, expected, arguments)
    factors = calibrated(results[0], device, arguments.model, launching)
    table = Table("run", "requests", "tokens in, out", "measured s", "predicted s", "error")
    for column in table.columns[1:]:
        column.justify = "right"
    measured = [result["wall_seconds"] for result in results]
    predicted = [predict(run, factors, device, arguments) for run in runs]
    off = errors(measured, predicted)
    for run, *seconds, error in zip(runs, measured, predicted, off, strict=True):
        table.add_row(
            run.name,
            str(run.num_requests),
            f"{run.prompt_tokens}, {run.new_tokens}",
            *(f"{each:.1f}" for each in seconds),
            f"{error:+.1%}" + (" (calibrated)" if run.name == CALIBRATION else ""),
        )
    print_table(table)
    if arguments.json is not None:
        kept: dict[str, Any] = {
            "device": asdict(device),
            "factors": asdict(factors),
            "share": arguments.share,
        }
        kept["runs"] = {run.name: result for run, result in zip(runs, results, strict=True)}
        kept["predicted_seconds"] = dict(zip(kept["runs"], predicted, strict=True))
        arguments.json.write_text(json_text(kept, indent=2), encoding="utf-8")
    return int(any(abs(error) > arguments.limit for error in off))


if __name__ == "__main__":
    sys.exit(main())

"""A batch job over more data than its driver may hold: memory, kills, and replicas side by side.

The input is Parquet of `--gib` GiB, 95% of it in a column that no prompt uses. The job runs through
`saqqara batch --replicas 2` on a tiny model with random weights; its driver is killed half-way,
then (with one replica, whose process it is) between the write of a part and its commit, and then
the job runs to its end. What must hold: the driver stays under 1 GiB and does not grow, each row
has one record, and a finished job that is run again does nothing. Where this process is root the
kernel keeps the limit (a control group), else it is only sampled, which the output says. Last, two
replicas against one on a model whose step sleeps, so that cores are no limit.

    python benchmarks/batch_scale.py --out results/batch     (minutes, and the disk of its input)
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from harness.local_ray import ray_head
from harness.memory_limit import MemoryLimit, memory_limit
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from saqqara.cluster.batch.answers import AnswerSettings
from saqqara.cluster.batch.parts.job import PartsJob, run_parts
from saqqara.cluster.batch.summary import BatchSummary
from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.engine.client import EngineClient, LocalClient
from saqqara.cluster.engine.executor import LocalExecutor
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.json_text import json_text
from saqqara.configs.schema import EngineConfig
from saqqara.workers.cgroups import usable_cores
from saqqara.workers.plan import StepPlan, StepResult

MIB = 2**20
LIMIT_BYTES = 2**30
OBJECT_STORE_BYTES = 2**30
MAX_GROWTH_BYTES = 64 * MIB  # from the first quarter with rows to the last: what an allocator does
MIN_PARTS = 5  # of a run, to tell how its memory goes
MIN_SPEEDUP = 1.8
ROW_BYTES = 100_000
PROMPT_BYTES = 5_000  # 5% of a row
NUM_FILES = 8
GROUP_ROWS = 500
SAMPLE_SECONDS = 0.1
STEP_SECONDS = 0.05
SPEED_ROWS = 1600
KILLED = -signal.SIGKILL

# Runs the command, and dies by its own hand between the write of the third part and its commit.
DIES_AT_COMMIT = """
import os, signal, sys
from saqqara.cluster.batch.parts import folder
from saqqara.cli import main
num_parts = 0
def sync(fs, file):
    global num_parts
    file.flush()
    num_parts += "part-" in file.name
    if num_parts == 3:
        os.kill(os.getpid(), signal.SIGKILL)
folder._sync = sync
main()
"""


@dataclass(frozen=True)
class Surroundings:
    """What the command runs in: its environment, and the limit on its driver's memory."""

    env: dict[str, str]
    limit: MemoryLimit | None


@dataclass
class Driver:
    """One run of the command: its exit code, its time, and its memory over time.

    `samples` are (parts that are there, resident bytes).
    """

    label: str
    exit_code: int = 0
    seconds: float = 0.0
    samples: list[tuple[int, int]] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """The most it had."""
        return max(resident for _, resident in self.samples)

    @property
    def growth_bytes(self) -> int | None:
        """From the first quarter of the parts of this run to the last, the most of each.

        None where they are too few to tell, as after a kill at the third.
        """
        first, last = self.samples[0][0], self.samples[-1][0]
        if last - first < MIN_PARTS:
            return None
        quarter = (last - first) // 4
        early = [r for parts, r in self.samples if first < parts <= first + quarter]
        late = [r for parts, r in self.samples if parts > last - quarter]
        return max(late) - max(early) if early and late else None


class Sleeping:
    """An executor whose steps take their time without a core."""

    def __init__(self, inner: LocalExecutor) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def execute(self, plan: StepPlan) -> "Future[list[StepResult]]":
        """Sleep, then run the step."""
        time.sleep(STEP_SECONDS)
        return self._inner.execute(plan)


def sleeping_engine(config: EngineConfig) -> EngineClient:
    """An engine in this process whose steps sleep."""
    return LocalClient(config, Sleeping(LocalExecutor(config)))


def save_model(folder: Path) -> None:
    """A tiny Llama whose tokens are words, so that a prompt of 5 KB is some 16 tokens."""
    words = [f"w{i}" for i in range(500)]
    vocab = {token: i for i, token in enumerate(["<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocab),
        max_position_embeddings=256,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def write_input(folder: Path, num_rows: int) -> None:
    """Files of Parquet with `num_rows` rows in all; the column `image` is noise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    folder.mkdir()
    schema = pa.schema([("prompt", pa.string()), ("image", pa.binary())])
    for number, rows in enumerate(np.array_split(np.arange(num_rows), NUM_FILES)):
        file = folder / f"{number}.parquet"
        with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
            for start in range(0, len(rows), GROUP_ROWS):
                count = len(rows[start : start + GROUP_ROWS])
                noise = random.bytes(count * (ROW_BYTES - PROMPT_BYTES))
                size = ROW_BYTES - PROMPT_BYTES
                images = [noise[i * size : (i + 1) * size] for i in range(count)]
                prompts = [prompt(int(row)) for row in rows[start : start + count]]
                writer.write_table(pa.table([prompts, images], schema=schema))


def prompt(row: int) -> str:
    """A word that is known, and 15 long ones that are not."""
    return " ".join([f"w{row % 500}", *(f"{row + i:0312d}" for i in range(16))])


def run_command(
    command: Sequence[str],
    output: Path,
    label: str,
    within: Surroundings,
    kill_at: int | None = None,
) -> Driver:
    """Run the command, sampling its driver's memory; kill it once so many parts are there."""
    driver = Driver(label)
    started = time.perf_counter()
    enter = None if within.limit is None else within.limit.enter
    process = subprocess.Popen(command, env=within.env, start_new_session=True, preexec_fn=enter)
    watched = psutil.Process(process.pid)
    try:
        while process.poll() is None:
            parts = len(list(output.glob("part-*")))
            try:
                driver.samples.append((parts, watched.memory_info().rss))
            except psutil.NoSuchProcess:
                break
            if kill_at is not None and parts >= kill_at:
                process.kill()
            time.sleep(SAMPLE_SECONDS)
    finally:
        process.kill()
        driver.exit_code = process.wait()
    driver.seconds = time.perf_counter() - started
    return driver


def rows_of(output: Path) -> Iterator[tuple[str, int]]:
    """File and line of every record; fails if one is an error."""
    for file in sorted(output.glob("part-*.jsonl")):
        with file.open() as lines:
            for line in lines:
                record = json.loads(line)
                assert record["error"] is None, record
                yield record["file"], record["line"]


def run_job(
    folder: Path, num_rows: int, num_replicas: int, within: Surroundings
) -> tuple[list[Driver], dict[str, int]]:
    """The job, killed twice, run to its end, and once more; fails unless all is as it must be."""
    output = folder / "out"
    arguments = ["batch", str(folder / "in/*.parquet"), "--output", str(output)]
    arguments += ["--model", str(folder / "model"), "--load-format", "dummy", "--device", "cpu"]
    arguments += ["--dtype", "float32", "--kv-memory-gib", "0.05", "--num-threads", "1"]
    arguments += ["--temperature", "0", "--max-tokens", "2", "--part-rows", str(GROUP_ROWS)]
    command = [sys.executable, "-m", "saqqara.cli", *arguments]
    whole = [*command, "--replicas", str(num_replicas)]
    label = f"replicas: {num_replicas}"
    num_parts = -(-num_rows // GROUP_ROWS)
    runs = [run_command(whole, output, f"{label}, killed half-way", within, num_parts // 2)]
    assert runs[-1].exit_code == KILLED
    dying = [sys.executable, "-c", DIES_AT_COMMIT, *arguments]
    runs.append(run_command(dying, output, "replicas: 1, killed before a commit", within))
    assert runs[-1].exit_code == KILLED
    assert list((output / "_staging").iterdir()), "nothing was written without its commit"
    runs.append(run_command(whole, output, f"{label}, to the end", within))
    assert runs[-1].exit_code == 0
    found = Counter(rows_of(output))
    assert len(found) == num_rows, (len(found), num_rows)
    assert set(found.values()) == {1}
    before = {file: file.stat().st_mtime_ns for file in output.iterdir()}
    runs.append(run_command(whole, output, "run again", within))
    assert runs[-1].exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in output.iterdir()} == before
    limit = within.limit
    assert limit is None or limit.num_kills() == 0, "the kernel killed a driver to keep its limit"
    for run in runs:
        assert run.peak_bytes < LIMIT_BYTES, (run.label, run.peak_bytes)
    for run in (runs[0], runs[2]):
        growth = run.growth_bytes
        assert growth is not None, "too few parts: give more --gib"
        assert growth < MAX_GROWTH_BYTES, (run.label, growth)
    return runs, {"rows": len(found), "parts": num_parts}


def run_sleeping(folder: Path, num_replicas: int) -> BatchSummary:
    """A job on engines whose steps sleep."""
    config = EngineConfig(
        model=str(folder / "model"),
        load_format="dummy",
        dtype="float32",
        device="cpu",
        kv_memory_gib=0.05,
        num_threads=1,
        max_num_seqs=8,
        prefix_caching=False,
    )
    source = folder / "short.jsonl"
    if not source.exists():
        lines = [json.dumps({"prompt": f"w{i % 500}"}) + "\n" for i in range(SPEED_ROWS)]
        source.write_text("".join(lines))
    job = PartsJob(
        (str(source),),
        str(folder / f"speed-{num_replicas}"),
        AnswerSettings(config, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)),
        num_replicas=num_replicas,
        part_rows=20,
    )
    return run_parts(job, make_client=partial(sleeping_engine, config))


def show(runs: Sequence[Driver]) -> Table:
    """The runs of the driver."""
    table = Table("driver", "exit", "seconds", "RSS at most", "RSS, first quarter to last")
    for run in runs:
        table.add_row(
            run.label,
            str(run.exit_code),
            f"{run.seconds:.0f}",
            f"{run.peak_bytes / MIB:.0f} MiB",
            "-" if run.growth_bytes is None else f"{run.growth_bytes / MIB:+.0f} MiB",
        )
    return table


def measure_job(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the job over a large input."""
    num_rows = int(options.gib * 2**30 / ROW_BYTES)
    write_input(folder / "in", num_rows)
    num_bytes = sum(file.stat().st_size for file in (folder / "in").iterdir())
    # A Ray of the job's own would be started by the driver, and share its limit.
    ray = ray_head(usable_cores(), OBJECT_STORE_BYTES) if options.replicas > 1 else None
    with ray or nullcontext() as head, memory_limit(LIMIT_BYTES) as limit:
        env = dict(os.environ) if head is None else head.env | {"RAY_ADDRESS": head.gcs_address}
        print("limit: 1 GiB,", "sampled only" if limit is None else "kept by the kernel")
        runs, counts = run_job(folder, num_rows, options.replicas, Surroundings(env, limit))
    print_table(show(runs))
    found = [{**vars(run), "peak": run.peak_bytes, "growth": run.growth_bytes} for run in runs]
    kept_by = "kernel" if limit is not None else "nobody: sampled"
    return {"input_bytes": num_bytes, "limit_kept_by": kept_by, **counts, "runs": found}


def measure_speed(folder: Path) -> dict[str, float]:
    """Rows per second of one replica and of two, on steps that sleep."""
    rates = []
    for num_replicas in (1, 2):
        summary = run_sleeping(folder, num_replicas)
        assert summary.complete
        rates.append(summary.rows / summary.wall_seconds)
    one, two = rates
    print(f"rows/s: {one:.1f} with one replica, {two:.1f} with two, {two / one:.2f} times as many")
    return {"one": one, "two": two, "times": two / one}


def main() -> None:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2e9 / 2**30, help="of input [2 GB]")
    parser.add_argument("--replicas", type=int, default=2, help="of the job over it [2]")
    parser.add_argument("--only", choices=["job", "speed"], help="leave the other half out")
    parser.add_argument("--out", type=Path, help="folder for batch_scale.json")
    options = parser.parse_args()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    folder = Path(tempfile.mkdtemp(prefix="saqqara-batch-"))
    found: dict[str, Any] = {}
    try:
        save_model(folder / "model")
        if options.only != "speed":
            found["job"] = measure_job(folder, options)
        if options.only != "job":
            found["speed"] = measure_speed(folder)
    finally:
        shutil.rmtree(folder)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "batch_scale.json").write_text(json_text(found) + "\n")
    if "speed" in found and found["speed"]["times"] < MIN_SPEEDUP:
        sys.exit(f"two replicas are {found['speed']['times']:.2f} times one, not {MIN_SPEEDUP}")


if __name__ == "__main__":
    main()

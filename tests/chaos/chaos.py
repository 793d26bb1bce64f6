"""A batch job while its ranks, its controller and its driver are killed, stopped and sent to sleep.

What must hold in the end: every row has exactly one record, none an error, and each the tokens of
a run that nobody disturbed; no page, process, port, shared memory or placement group is left; each
fault is noticed within ten seconds. Prints a table of the times, writes JSON.

    make chaos                                            (100 rows, 24 faults: some 15 minutes)
    make chaos ARGS="--rows 30 --faults 7 --seed 3"
    make chaos ARGS="--calm-minutes 30"          (no fault, beside two busy loops)
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

import psutil
import ray
from rich.table import Table
from support.byte_llama import save_tiny_llama
from support.faults import (
    Fault,
    Outcome,
    actors,
    inflict,
    listening,
    num_losses,
    outcomes,
    schedule,
    shared_memory,
)

from saqqara.cluster.batch.summary import BatchSummary
from saqqara.cluster.cli.tables import print_table
from saqqara.configs.json_text import json_text

DECODE = {"slack_pages": 1}
RETENTIONS: Sequence[Any] = (
    "full",
    {"method": "pyramidkv", "budget": "25%", "window": 8, "decode": DECODE},
    {"method": "h2o", "budget": "25%", "decode": DECODE},
    {"method": "snapkv", "budget": "25%", "window": 8, "decode": DECODE},
    {
        "method": "pyramidinfer",
        "propagate": {"min_context": 16},
        "decode": {"trigger": "published"},
    },
)
JOB = Path(__file__).parents[1] / "support" / "chaos_job.py"
DETECTION_SECONDS = 10.0
EARLY = 0.2  # of the faults come while the last one may not be over
EARLY_SECONDS = 12.0  # after it, at most
STUCK_SECONDS = 600.0
LEAVE_SECONDS = 20.0


def main() -> int:
    """Run the jobs, print and write; 1 if something that must hold does not."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sq-") as folder, local_ray(Path(folder)):
        bed = Bed(Path(folder), arguments)
        result = bed.stay_calm() if arguments.calm_minutes else bed.go_mad()
    report(result, arguments.out)
    return 0 if all(result["checks"].values()) else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calm-minutes", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=Path("results/chaos"))
    return parser.parse_args()


@contextmanager
def local_ray(folder: Path) -> Iterator[None]:
    """A Ray of our own, which drivers find by `RAY_ADDRESS`."""
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(folder / "ray"),
    )
    try:
        yield
    finally:
        ray.shutdown()


class Bed:
    """Where jobs run: their files, and the Ray that they share."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder = folder
        self.arguments = arguments
        self.chance = random.Random(arguments.seed)
        self.model = folder / "model"
        save_tiny_llama(self.model)
        self.input = folder / "in.jsonl"
        rows = make_rows(arguments.rows, self.chance)
        self.input.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def go_mad(self) -> dict[str, Any]:
        """The job twice: undisturbed, and under faults."""
        memory = shared_memory()
        calm = self.run_undisturbed("calm")
        started = time.monotonic()
        mad, faults, summary = self.run_disturbed("mad")
        seconds = time.monotonic() - started
        left = leftovers(memory)
        logs = [self.folder / "mad" / "controller.log", self.folder / "mad.log"]
        times = list(outcomes(faults, logs))
        num_suffered = sum(not fault.kind.endswith("driver") for fault in faults)
        for log in logs:
            shutil.copy(log, self.arguments.out)
        different = [line for line in calm if mad.get(line) != calm[line]]
        return {
            "rows": self.arguments.rows,
            "faults": dict(Counter(fault.kind for fault in faults)),
            "seconds": seconds,
            "times": times_by_kind(times),
            "recoveries": summary.report.recoveries if summary.report else {},
            "different_rows": different,
            "left": left,
            "checks": {
                "each row once, none with an error": sorted(mad) == sorted(calm),
                "tokens as undisturbed": not different,
                "enough faults": len(faults) >= self.arguments.faults,
                "noticed within 10 s": all(t.detected <= DETECTION_SECONDS for t in times),
                "no false alarm": num_losses(logs) <= num_suffered,
                "page integrity": (summary.integrity or "").startswith("ok"),
                "nothing is left": not any(left.values()),
            },
        }

    def stay_calm(self) -> dict[str, Any]:
        """Undisturbed jobs beside two busy loops: nobody may be taken for lost."""
        deadline = time.monotonic() + 60 * self.arguments.calm_minutes
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
        recoveries: Counter[str] = Counter()
        num_jobs = 0
        try:
            while time.monotonic() < deadline:
                name = f"calm-{num_jobs}"
                self.run_undisturbed(name)
                report = self.summary(name).report
                recoveries += Counter(report.recoveries if report else {})
                num_jobs += 1
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
        return {
            "minutes": self.arguments.calm_minutes,
            "jobs": num_jobs,
            "recoveries": dict(recoveries),
            "checks": {"no false alarm": not recoveries},
        }

    def run_undisturbed(self, name: str) -> dict[int, list[int]]:
        """Run the job to its end; the tokens of each line."""
        driver = self.start(name)
        assert driver.wait(3600) == 0, (self.folder / f"{name}.log").read_text()[-4000:]
        return self.tokens(name)

    def run_disturbed(self, name: str) -> tuple[dict[int, list[int]], list[Fault], BatchSummary]:
        """Run the job under faults, its driver again whenever that was killed."""
        kinds = schedule(self.arguments.faults, self.chance)
        faults: list[Fault] = []
        driver = self.start(name)
        try:
            while kinds:
                is_early = bool(faults) and self.chance.random() < EARLY
                if is_early:
                    time.sleep(self.chance.uniform(0.0, EARLY_SECONDS))
                else:
                    self.await_progress(name, driver)
                if driver.poll() is not None:
                    break  # the job is over
                at = inflict(kinds[-1], psutil.Process(driver.pid), self.folder / name, self.chance)
                if at is not None:
                    faults.append(Fault(kinds.pop(), at, is_early))
                    print(f"{len(faults)}: {faults[-1].kind}{' (early)' * is_early}", flush=True)
                if faults and faults[-1].kind == "kill driver" and driver.wait(60) != 0:
                    driver = self.start(name)
            assert driver.wait(3600) == 0, (self.folder / f"{name}.log").read_text()[-4000:]
        finally:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        return self.tokens(name), faults, self.summary(name)

    def await_progress(self, name: str, driver: "subprocess.Popen[bytes]") -> None:
        """Wait for some rows more, and then a moment."""
        wanted = self.num_rows(name) + self.chance.randint(1, 2)
        deadline = time.monotonic() + STUCK_SECONDS
        while self.num_rows(name) < wanted and driver.poll() is None:
            assert time.monotonic() < deadline, "the job is stuck"
            time.sleep(0.02)
        time.sleep(self.chance.uniform(0.0, 0.5))

    def start(self, name: str) -> "subprocess.Popen[bytes]":
        """The job's driver; another one goes on where the last has ended."""
        output = self.folder / f"{name}.jsonl"
        arguments = [self.input, output, self.model, self.folder / name, self.summary_file(name)]
        env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen([sys.executable, JOB, *arguments], env=env, stderr=log)

    def num_rows(self, name: str) -> int:
        """Records so far."""
        output = self.folder / f"{name}.jsonl"
        return output.read_bytes().count(b"\n") if output.exists() else 0

    def tokens(self, name: str) -> dict[int, list[int]]:
        """The tokens of each line's answer; a line has one record, and it is no error."""
        text = (self.folder / f"{name}.jsonl").read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()]
        lines = Counter(record["line"] for record in records)
        assert set(lines.values()) == {1}, f"more than one record: {lines.most_common(3)}"
        errors = [record for record in records if record.get("error") is not None]
        assert not errors, errors[:3]
        return {record["line"]: record["token_ids"] for record in records}

    def summary_file(self, name: str) -> Path:
        """Where a job that has ended leaves its summary."""
        return self.folder / f"{name}.summary"

    def summary(self, name: str) -> BatchSummary:
        """Of the run that ended a job."""
        return BatchSummary.model_validate_json(self.summary_file(name).read_text("utf-8"))


def make_rows(num_rows: int, chance: random.Random) -> list[dict[str, Any]]:
    """Prompts of all lengths, under every method; every third is sampled."""
    return [
        {
            "prompt": f"row {i}: " + "".join(chance.choices("abcdef ", k=chance.randint(40, 250))),
            "max_tokens": chance.randint(60, 160),
            "retention": RETENTIONS[i % len(RETENTIONS)],
            "temperature": 0.8 if i % 3 == 0 else 0.0,
            "seed": i,
        }
        for i in range(num_rows)
    ]


def leftovers(memory_before: set[str]) -> dict[str, list[str]]:
    """What the jobs have left behind."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        processes = [*actors("RankProcess"), *actors("Controller")]
        groups = ray.util.placement_group_table()
        held = [name for name, group in groups.items() if group["state"] != "REMOVED"]
        if not (processes or held) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return {
        "processes": [str(process) for process in processes],
        "ports": listening(processes),
        "placement groups": held,
        "shared memory": sorted(shared_memory() - memory_before),
    }


def times_by_kind(times: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Median and maximum of the seconds until a fault was noticed, and until there was a token."""
    found: dict[str, dict[str, float]] = {}
    for kind in sorted({outcome.kind for outcome in times}):
        detected = [outcome.detected for outcome in times if outcome.kind == kind]
        back = [outcome.back for outcome in times if outcome.kind == kind]
        found[kind] = {
            "count": len(back),
            "detected_p50": statistics.median(detected),
            "detected_max": max(detected),
            "back_p50": statistics.median(back),
            "back_max": max(back),
        }
    return found


def report(result: dict[str, Any], folder: Path) -> None:
    """Print a table; leave the numbers as JSON."""
    table = Table(title="Seconds after a fault")
    for name in ("fault", "times", "noticed, p50", "max", "new token, p50", "max"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for kind, row in result.get("times", {}).items():
        count, *seconds = row.values()
        table.add_row(kind, f"{count:g}", *(f"{value:.1f}" for value in seconds))
    if table.row_count:
        print_table(table)
    for name in ("faults", "recoveries", "seconds", "different_rows", "left", "jobs"):
        if name in result:
            print(f"{name}: {result[name]}")
    for name, holds in result["checks"].items():
        print(f"{name}: {'yes' if holds else 'NO'}")
    (folder / "chaos.json").write_text(json_text(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

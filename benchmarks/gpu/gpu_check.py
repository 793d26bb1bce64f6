"""Proves the GPU path on one GPU and measures it: kernels, graphs, parity, speed of real shapes.

    PYTHONPATH=src python benchmarks/gpu/gpu_check.py [--first | --rest] [--only step]

Needs torch with CUDA, triton and transformers, and neither a network nor Ray. `--first` takes under
340 seconds and `--rest` under 350: every section is a process that is killed at its limit, and
every row is written when it is measured. Prints one table last and ends with status 1 if something
is not proven right, or failed; see docs/gpu.md.
"""

import os

# Sections are forked, and CUDA works only in a process whose parent has not started it: this one
# asks nothing of a GPU, and where a library does while it is imported, NVML answers.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import gpu_process
import torch
from gpu_report import CAP_GIB, GIB, Bench, Deadline, Row, table
from gpu_sections import REAL, TOY, Rows, Section, sections

from saqqara.configs.json_text import json_text

FIRST_SECONDS, REST_SECONDS = 330.0, 340.0
_MOST_MEMORY = 0.9  # of a GPU that is smaller than the cap
_DEVICE_SECONDS = 30.0


@dataclass
class Results:
    """What was found so far; written after every section.

    Attributes:
        out: the folder; rows are in `rows.jsonl` when they are measured.
        rows: of all sections, in order.
        has_passed: whether nothing is wrong or failed, and the sections that prove have `ok` only.
    """

    out: Path
    rows: list[Row] = field(default_factory=list)
    has_passed: bool = True

    def add(self, rows: Sequence[Row], *, proves: bool) -> None:
        """Take in the rows of one more section, and write all."""
        self.rows += rows
        passing = {"ok"} if proves else {"ok", "missed", "skipped"}
        self.has_passed &= all(row.state in passing for row in rows)
        facts = {
            "torch": torch.__version__,
            "has_passed": self.has_passed,
            "rows": [asdict(row) for row in self.rows],
        }
        (self.out / "results.json").write_text(json_text(facts, indent=1), encoding="utf-8")
        (self.out / "table.txt").write_text(table(self.rows) + "\n", encoding="utf-8")


def run_section(section: Section, device: torch.device, total: Deadline, out: Path) -> list[Row]:
    """The rows of a section; whatever goes wrong in it is a row, too."""
    print(f"{section.name}: {total.seconds_left:.0f} s left of all", flush=True)
    seconds = min(section.seconds, total.seconds_left)
    file = out / "rows.jsonl"
    if seconds == 0:
        rows = [Row(section.name, "no time was left", state="skipped")]
        gpu_process.append(file, rows)
        return rows
    deadline = Deadline.after(seconds)
    parts = {name: partial(_rows, part, device, deadline) for name, part in section.parts.items()}
    return gpu_process.run_together(parts, seconds, file)


def _rows(part: Rows, device: torch.device, deadline: Deadline) -> Iterator[Row]:
    """What one process of a section measures."""
    if device.type == "cpu":
        torch.set_num_threads(1)
        return part(Bench(device, torch.float32, deadline, attention_backend="torch"))
    torch.cuda.set_device(device)
    cap_bytes = min(int(CAP_GIB * GIB), int(_MOST_MEMORY * torch.cuda.mem_get_info(device)[1]))
    return part(Bench(device, torch.bfloat16, deadline, cap_bytes))


def _device(device: torch.device) -> Iterator[Row]:
    """What the rows were measured on."""
    if device.type == "cpu":
        yield Row("device", f"CPU, toy sizes, torch {torch.__version__}")
        return
    if not torch.cuda.is_available():
        yield Row("device", "no CUDA GPU; --toy tries all at toy sizes on the CPU", state="failed")
        return
    import triton

    about = torch.cuda.get_device_properties(device)
    version = f"torch {torch.__version__}, triton {triton.__version__}"
    yield Row("device", f"{about.name}, {about.total_memory / GIB:.0f} GiB, {version}")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    names = [section.name for section in sections(REAL, Path())]

    def some(text: str) -> list[str]:
        if unknown := sorted(set(text.split(",")) - set(names)):
            known = ", ".join(names)
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {known}")
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", help="folder for rows, numbers and traces; default: by the half")
    parser.add_argument(
        "--only",
        action="extend",
        type=some,
        metavar="NAME,...",
        help=f"of the sections {', '.join(names)}",
    )
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--first", action="store_true", help="correctness, step and its trace")
    half.add_argument("--rest", action="store_true", help="whole models")
    parser.add_argument("--seconds", type=float, help="for all sections")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, for a test")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Check, measure, write the numbers, print the table."""
    options = arguments(words)
    device = torch.device("cpu") if options.toy else torch.device("cuda", 0)
    half = "_first" if options.first else "_rest" if options.rest else ""
    out = Path(options.out or f"gpu_check{half}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").write_text("", encoding="utf-8")
    chosen = [x for x in sections(TOY if options.toy else REAL, out) if _is_chosen(x, options)]
    halves = {section.is_first for section in chosen}
    limit = FIRST_SECONDS * (True in halves) + REST_SECONDS * (False in halves)
    total = Deadline.after(limit if options.seconds is None else options.seconds)
    results, started = Results(out), time.monotonic()
    about = gpu_process.run("device", partial(_device, device), _DEVICE_SECONDS, out / "rows.jsonl")
    results.add(about, proves=True)
    if not results.has_passed:
        return 1
    for section in chosen:
        results.add(run_section(section, device, total, out), proves=section.proves)
    print(f"\n{table(results.rows)}\n{time.monotonic() - started:.0f} s", flush=True)
    return 0 if results.has_passed else 1


def _is_chosen(section: Section, options: argparse.Namespace) -> bool:
    if options.only is not None:
        return section.name in options.only
    return section.is_first != options.rest if options.first or options.rest else True


if __name__ == "__main__":
    sys.exit(main())

"""Proves the GPU path on one GPU and measures it: kernels, graphs, parity, speed of real shapes.

    PYTHONPATH=src python benchmarks/gpu/gpu_check.py [--only step] [--trace traces] [--out FILE]

Needs torch with CUDA, triton and transformers, and neither a network nor Ray. Meant to take under
nine minutes on an H200: every section has its time, and what does not fit is skipped and says so.
Prints one table last and ends with status 1 if something is not proven right, or failed; see
docs/gpu.md.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gpu_engine
import gpu_kernels
import torch
from gpu_baselines import release
from gpu_models import LLAMA_2_13B, LLAMA_3_8B, LLAMA_3_8B_QUARTER, LLAMA_3_70B_RANK, Load
from gpu_report import (
    CAP_GIB,
    GIB,
    Bench,
    Deadline,
    OutOfTimeError,
    Row,
    failure,
    is_usable,
    table,
)

from saqqara.compression.retention import Retention
from saqqara.configs.json_text import json_text

TOTAL_SECONDS = 520.0
NUM_SEEDS = 4
_MOST_MEMORY = 0.9  # of a GPU that is smaller than the cap
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BUDGETS = {
    "full": Retention.parse("full"),
    "pyramidkv 25%": Retention.parse("pyramidkv", "25%"),
    "pyramidkv 10%": Retention.parse("pyramidkv", "10%"),
}
_RANK_BUDGETS = {name: _BUDGETS[name] for name in ("full", "pyramidkv 25%")}


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: for `--only`.
        seconds: that it may take at most.
        proves: whether it says if something is computed right: then all of its rows must be `ok`.
        run: makes its rows.
    """

    name: str
    seconds: float
    proves: bool
    run: Callable[[Bench], Iterator[Row]]


def _rank_of_70b(bench: Bench) -> Iterator[Row]:
    """One rank's shapes; without the exchanges that eight ranks would need in every layer."""
    rows = gpu_engine.measure_retentions(
        bench, LLAMA_3_70B_RANK, Load(4096, 256, 64), _RANK_BUDGETS
    )
    for row in rows:
        result = f"{row.result}; extrapolated to 8 GPUs, without communication"
        yield Row(row.what, result, row.numbers, row.state)


SECTIONS = (
    Section("kernels", 150, True, lambda b: gpu_kernels.check_kernels(b, _DTYPES, NUM_SEEDS)),
    Section("parity", 60, True, gpu_engine.check_parity),
    Section(
        "bandwidth", 20, False, lambda b: gpu_kernels.measure_decode(b, gpu_kernels.DecodeSizes())
    ),
    Section(
        "retention", 20, False, lambda b: gpu_kernels.measure_retention(b, gpu_kernels.LayerSizes())
    ),
    Section(
        "step",
        60,
        False,
        lambda b: gpu_engine.measure_step(b, LLAMA_3_8B_QUARTER, Load(4096, 100, 64)),
    ),
    Section(
        "13b",
        170,
        False,
        lambda b: gpu_engine.compare_13b(b, LLAMA_2_13B, Load(512, 256, 32), max_num_seqs=256),
    ),
    Section(
        "8b",
        110,
        False,
        lambda b: gpu_engine.measure_retentions(b, LLAMA_3_8B, Load(8192, 512, 24), _BUDGETS),
    ),
    Section("70b", 70, False, _rank_of_70b),
)
TRACED = {"bandwidth", "retention", "step"}


@dataclass
class Results:
    """What was found so far; written after every section, so that nothing is lost with the process.

    Attributes:
        out: the file.
        device: name of the GPU.
        rows: of all sections, in order.
        has_passed: whether nothing is wrong or failed, and the sections that prove have `ok` only.
    """

    out: Path
    device: str
    rows: list[Row] = field(default_factory=list)
    has_passed: bool = True

    def add(self, section: Section, rows: Sequence[Row]) -> None:
        """Take in the rows of one more section, and write all."""
        self.rows += rows
        passing = {"ok"} if section.proves else {"ok", "missed", "skipped"}
        self.has_passed &= all(row.state in passing for row in rows)
        facts = {
            "device": self.device,
            "torch": torch.__version__,
            "has_passed": self.has_passed,
            "rows": [asdict(row) for row in self.rows],
        }
        self.out.write_text(json_text(facts, indent=1), encoding="utf-8")

    def resume(self) -> None:
        """Go on after the sections that the file has."""
        facts = json.loads(self.out.read_text(encoding="utf-8"))
        self.rows, self.has_passed = [Row(**row) for row in facts["rows"]], facts["has_passed"]

    def show(self) -> None:
        """Print the table."""
        print(f"\n{self.device}, torch {torch.__version__}\n{table(self.rows)}", flush=True)


def run_section(
    section: Section, device: torch.device, total: Deadline, trace: Path | None = None
) -> list[Row]:
    """The rows of a section; whatever goes wrong in it is a row, too."""
    print(f"{section.name}: {total.seconds_left:.0f} s left of all", flush=True)
    if total.seconds_left == 0:
        return [Row(section.name, "no time was left", state="skipped")]
    rows: list[Row] = []
    try:
        cap_bytes = int(CAP_GIB * GIB)
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[1]
            cap_bytes = min(cap_bytes, int(_MOST_MEMORY * memory))
        bench = Bench(device, torch.bfloat16, total.part(section.seconds), cap_bytes)
        with traced(trace):
            for row in section.run(bench):
                rows.append(row)
                print(f"  {table([row])}", flush=True)
    except OutOfTimeError:
        text = f"the rest would take over {section.seconds:.0f} s"
        rows.append(Row(section.name, text, state="skipped"))
    except Exception as error:
        rows.append(failure(section.name, error))
    with suppress(RuntimeError):  # after an illegal access nothing works; the table must still come
        release()
    return rows


@contextmanager
def traced(file: Path | None) -> Iterator[None]:
    """Write a profiler trace of what runs inside, if a file is given."""
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        yield
    profile.export_chrome_trace(str(file))


def start_anew(rest: Sequence[Section], total: Deadline, options: argparse.Namespace) -> None:
    """Become a new process that runs the other sections: this one's CUDA context is lost."""
    names = ",".join(section.name for section in rest)
    print(f"the CUDA context is lost; a new process runs {names}", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--resume", "--only", names]
    command += ["--seconds", f"{total.seconds_left:.0f}", "--out", str(options.out)]
    if options.trace is not None:
        command += ["--trace", options.trace]
    os.execv(sys.executable, command)


def _names(text: str) -> list[str]:
    """Names of sections, with commas between them."""
    known = [section.name for section in SECTIONS]
    names = text.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
    return names


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = ",".join(section.name for section in SECTIONS)
    parser.add_argument("--out", default="gpu_check.json", help="file for the numbers")
    parser.add_argument(
        "--only", action="extend", type=_names, metavar="NAME,...", help=f"of the sections {names}"
    )
    traces = ", ".join(sorted(TRACED))
    parser.add_argument("--trace", help=f"folder for profiler traces of {traces}")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all sections")
    parser.add_argument("--resume", action="store_true", help="add to the rows in the file")
    return parser.parse_args(words)


def main() -> int:
    """Check, measure, write the numbers, print the table."""
    options = arguments()
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA GPU; on a CPU the same checks run in the tests")
        return 1
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    total = Deadline.after(options.seconds)
    results = Results(Path(options.out), torch.cuda.get_device_name(device))
    if options.resume:
        results.resume()
    chosen = [x for x in SECTIONS if options.only is None or x.name in options.only]
    for number, section in enumerate(chosen, start=1):
        wants_trace = options.trace is not None and section.name in TRACED
        trace = Path(options.trace) / f"{section.name}.json" if wants_trace else None
        results.add(section, run_section(section, device, total, trace))
        if chosen[number:] and not is_usable(device):
            start_anew(chosen[number:], total, options)
    results.show()
    return 0 if results.has_passed else 1


if __name__ == "__main__":
    sys.exit(main())

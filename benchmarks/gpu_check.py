"""Proves the GPU path on one GPU and measures it: kernels, graphs, parity, speed of real shapes.

    PYTHONPATH=src python benchmarks/gpu_check.py [--only step] [--trace traces] [--out FILE]

Needs torch with CUDA, triton and transformers, and neither a network nor Ray. Meant to take under
nine minutes on an H200: every section has its time, and what does not fit is skipped and says so.
Prints one table last and ends with status 1 if not everything is proven right. docs/gpu.md explains
the rows.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import gpu_engine
import gpu_kernels
import torch
from gpu_baselines import release
from gpu_models import LLAMA_2_13B, LLAMA_3_8B, LLAMA_3_8B_QUARTER, LLAMA_3_70B_RANK, Load
from gpu_report import CAP_GIB, GIB, Bench, Deadline, OutOfTimeError, Row, failure, table

from saqqara.compression.retention import Retention

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


def run_section(section: Section, device: torch.device, total: Deadline) -> list[Row]:
    """The rows of a section; whatever goes wrong in it is a row, too."""
    cap_bytes = int(CAP_GIB * GIB)
    if device.type == "cuda":
        cap_bytes = min(cap_bytes, int(_MOST_MEMORY * torch.cuda.mem_get_info(device)[1]))
    bench = Bench(device, torch.bfloat16, total.part(section.seconds), cap_bytes)
    print(f"{section.name}: {total.seconds_left:.0f} s left of all", flush=True)
    if total.seconds_left == 0:
        return [Row(section.name, "no time was left", state="skipped")]
    rows: list[Row] = []
    try:
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


def report(rows: Sequence[Row], out: Path, device: str) -> None:
    """Write the numbers, print the table."""
    facts = {"device": device, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    out.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    print(f"\n{device}, torch {torch.__version__}\n{table(rows)}")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--out", default="gpu_check.json", help="file for the numbers")
    parser.add_argument("--only", action="append", choices=names, help="run this section only")
    traces = ", ".join(sorted(TRACED))
    parser.add_argument("--trace", help=f"folder for profiler traces of {traces}")
    return parser.parse_args()


def main() -> int:
    """Check, measure, write the numbers, print the table."""
    options = arguments()
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA GPU; on a CPU the same checks run in the tests")
        return 1
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    total = Deadline.after(TOTAL_SECONDS)
    rows: list[Row] = []
    is_proven = True
    for section in SECTIONS:
        if options.only and section.name not in options.only:
            continue
        wants_trace = options.trace is not None and section.name in TRACED
        with traced(Path(options.trace) / f"{section.name}.json" if wants_trace else None):
            found = run_section(section, device, total)
        rows += found
        if section.proves:
            is_proven &= all(row.state == "ok" for row in found)
    report(rows, Path(options.out), torch.cuda.get_device_name(device))
    return 0 if is_proven else 1


if __name__ == "__main__":
    sys.exit(main())

"""Runs many random schedules of faults in processes, or one of them again, step by step.

python tests/support/run_fault_schedules.py --first 0 --number 100000 --processes 2
python tests/support/run_fault_schedules.py --again 4711
"""

import argparse
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # what it imports lies beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saqqara.workers.cgroups import usable_cores
from support.fault_schedules import Schedule, Tally, run_seeds

_SLICE = 250


def run_in_processes(
    first: int, number: int, processes: int, tell: Callable[[Tally], None] = lambda _: None
) -> Tally:
    """Run many schedules, and tell how far it is."""
    stop = first + number
    slices = [range(start, min(start + _SLICE, stop)) for start in range(first, stop, _SLICE)]
    tally = Tally()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_be_quiet) as pool:
        for part in pool.map(run_seeds, slices):
            tally.add(part)
            tell(tally)
    return tally


def main() -> None:
    """Run a range of seeds in processes, or one again, step by step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--number", type=int, default=100_000, help="of schedules")
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--again", type=int, metavar="SEED", help="one schedule, step by step")
    args = parser.parse_args()
    if args.again is not None:
        Schedule(args.again, tell=print).run()
        return
    start = time.perf_counter()

    def tell(tally: Tally) -> None:
        done = f"{tally.schedules} of {args.number}, {time.perf_counter() - start:.0f} s"
        print(done, file=sys.stderr, flush=True)

    print(run_in_processes(args.first, args.number, args.processes, tell))


def _be_quiet() -> None:
    logging.disable(logging.CRITICAL)


if __name__ == "__main__":
    main()

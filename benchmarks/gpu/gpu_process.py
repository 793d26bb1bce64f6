"""Sections in processes of their own: each has a hard limit, and its rows outlive it.

A section's process is forked from this one, which imports everything once and never touches the
GPU. It writes every row, one line of JSON, when it is measured. At its limit it is killed, with all
that it started; after an illegal access only its own rows are lost.
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from gpu_report import OutOfTimeError, Row, failure, table

from saqqara.configs.json_text import json_text

Rows = Callable[[], Iterator[Row]]
_FORKED = multiprocessing.get_context("fork")
_GRACE_SECONDS = 1.0  # past its limit, in which a section may end by itself


def run(name: str, rows: Rows, seconds: float, file: Path) -> list[Row]:
    """The rows of a section, which are appended to `file`, too; killed after so many seconds."""
    return run_together({name: rows}, seconds, file)


def run_together(sections: dict[str, Rows], seconds: float, file: Path) -> list[Row]:
    """The rows of several sections at once, in their order; each is a process."""
    started = time.monotonic()
    parts = {name: file.with_name(f"{name}.part") for name in sections}
    processes = {}
    for name, rows in sections.items():
        parts[name].write_text("", encoding="utf-8")
        processes[name] = _FORKED.Process(target=_work, args=(name, rows, parts[name]))
        processes[name].start()
    found: list[Row] = []
    for name, process in processes.items():
        process.join(max(0.0, started + seconds + _GRACE_SECONDS - time.monotonic()))
        was_killed = process.is_alive()
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # also what it has left behind
        process.join()
        mine = read(parts[name])
        if was_killed:
            mine.append(Row(name, f"ended after {seconds:.0f} s, its limit", state="skipped"))
        elif process.exitcode:
            mine.append(Row(name, f"its process ended with {process.exitcode}", state="failed"))
        parts[name].unlink()
        append(file, mine)
        found += mine
    return found


def _work(name: str, rows: Rows, file: Path) -> None:
    """What a section's process does."""
    os.setsid()
    try:
        for row in rows():
            append(file, [row])
            print(f"  {table([row])}", flush=True)
    except OutOfTimeError:
        append(file, [Row(name, "the rest would take longer than it may", state="skipped")])
    except Exception as error:
        append(file, [failure(name, error)])
    finally:
        os._exit(0)  # no clean-up may hang, and a lost GPU would make it fail


def append(file: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file of lines."""
    with file.open("a", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json_text(asdict(row)) + "\n")


def read(file: Path) -> list[Row]:
    """The rows of a file of lines; a line that its writer did not finish is left out."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return [Row(**json.loads(line)) for line in lines[:-1]]

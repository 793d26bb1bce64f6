"""An engine of `peers.py` in a process of its own: requests, replies, memory and CPU time."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

SAMPLE_SECONDS = 0.5  # between two looks at an engine's memory
STOP_SECONDS = 20.0
LOW_MEMORY_BYTES = 3 * 2**29  # 1.5 GiB: less must be left to the rest of the machine


class EngineFailedError(RuntimeError):
    """An engine did not start, did not answer, or answered wrongly."""


@dataclass(frozen=True)
class EngineSpec:
    """An engine as named on the command line, and the command that runs it (none: not there)."""

    name: str
    command: tuple[str, ...] | None
    missing: str | None = None


@dataclass
class EngineProcess:
    """An engine at the other end of a pipe; `protocol.py` says what goes through it."""

    spec: EngineSpec
    log: Path
    timeout_seconds: float
    started: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        assert self.spec.command is not None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log = self.log.open("w", encoding="utf-8")
        self._reader = ThreadPoolExecutor(1)
        self._process = subprocess.Popen(
            self.spec.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(self.spec.command),
            start_new_session=True,  # an interrupt goes to this script alone, which stops it
        )
        self._top = psutil.Process(self._process.pid)
        try:
            self.started = self._read()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def request(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """The reply to one request, checked, with this script's own measurements added.

        Raises:
            EngineFailedError: the engine failed, or some answer is not of `new_tokens` tokens.
        """
        assert self._process.stdin is not None
        own, busy, start = tree_cpu_seconds(self._top), busy_seconds(), time.perf_counter()
        try:
            self._process.stdin.write(
                json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n"
            )
            self._process.stdin.flush()
        except OSError as error:
            raise EngineFailedError(f"{error}; its log: {self.log}") from None
        reply = self._read()
        seconds = time.perf_counter() - start
        own, busy = tree_cpu_seconds(self._top) - own, busy_seconds() - busy
        share = (busy - own) / seconds / (os.cpu_count() or 1)
        reply["foreign_cpu_share"] = min(max(share, 0.0), 1.0)  # clocks tick every 10 ms
        lengths = [len(answer) for answer in reply["output_token_ids"]]
        if lengths != [new_tokens] * len(prompts):
            raise EngineFailedError(
                f"it answered {len(prompts)} prompts with {lengths} tokens instead of {new_tokens}"
            )
        return reply

    def stop(self) -> None:
        """End the process and its children; again does nothing.

        An engine has some seconds to end by itself.
        """
        tree = process_tree(self._top)
        assert self._process.stdin is not None
        with suppress(OSError):  # what it has not read of a request
            self._process.stdin.close()
        _, alive = psutil.wait_procs(tree, timeout=STOP_SECONDS)
        for process in alive:
            process.terminate()
        _, alive = psutil.wait_procs(alive, timeout=STOP_SECONDS)
        for process in alive:
            process.kill()
        self._process.wait()
        self._reader.shutdown()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def _kill(self) -> None:
        for process in process_tree(self._top):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _read(self) -> dict[str, Any]:
        """The next line, while the memory of the process tree is watched."""
        assert self._process.stdout is not None
        line: Future[str] = self._reader.submit(self._process.stdout.readline)
        deadline = time.perf_counter() + self.timeout_seconds
        peak = 0
        while not line.done():
            peak = max(peak, sum(map(rss_bytes, process_tree(self._top))))
            if psutil.virtual_memory().available < LOW_MEMORY_BYTES:
                self._kill()
                raise EngineFailedError("stopped: the machine was running out of memory")
            if time.perf_counter() > deadline:
                self._kill()
                raise EngineFailedError(
                    f"no answer in {self.timeout_seconds:.0f} s; its log: {self.log}"
                )
            wait([line], timeout=SAMPLE_SECONDS)
        if not line.result():
            raise EngineFailedError(f"it has ended; its log: {self.log}")
        reply: dict[str, Any] = json.loads(line.result())
        if "error" in reply:
            raise EngineFailedError(f"{reply['error']}; its log: {self.log}")
        reply["peak_rss_bytes"] = peak
        return reply


def environment(command: Sequence[str]) -> dict[str, str]:
    """This process's environment for an engine: no hub, and as many threads as it is told."""
    threads = command[command.index("--threads") + 1]
    own = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    without = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    return {k: v for k, v in os.environ.items() if k not in without} | own


def process_tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and all below it; empty when it has ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def rss_bytes(process: psutil.Process) -> int:
    """Resident memory of a process; 0 when it has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def tree_cpu_seconds(top: psutil.Process) -> float:
    """CPU time that a process and those below it have used."""
    total = 0.0
    for process in process_tree(top):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def busy_seconds() -> float:
    """CPU time that the machine has used, summed over cores."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)

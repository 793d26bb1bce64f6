"""What runs in the process of one rank: its log, its threads, and the worker itself. No Ray here.

`executor.RayExecutor` makes a `RankProcess` an actor. Starting takes two phases, because the
address of the rendezvous is known only once rank 0 runs: first every process comes up and rank 0
opens the store, then all of them start their workers together.
"""

import faulthandler
import importlib
import logging
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil

from saqqara.cluster.recovery.pulse import Pulse, PulseAddress
from saqqara.configs.paths import cache_dir
from saqqara.configs.schema import EngineConfig
from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers.cgroups import usable_cores
from saqqara.workers.plan import Grammar, StepPlan, StepResult, WorkerInfo

if TYPE_CHECKING:
    from saqqara.workers.mesh.layout import MeshLayout

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 1.0  # for processes that were told to end
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RankWorker(Protocol):
    """What a rank runs: `workers.worker.Worker`, or a stand-in for it in tests."""

    info: WorkerInfo

    def execute(self, plan: StepPlan) -> StepResult:
        """Run this rank's part of a plan."""
        ...

    def compile_grammar(self, grammar: Grammar) -> None:
        """Have a grammar ready; called by another thread than the one of the steps."""
        ...

    def check_integrity(self) -> None:
        """Raise `AssertionError` if the pages are not all accounted for."""
        ...

    def close(self) -> None:
        """Leave the process groups."""
        ...


WorkerFactory = Callable[
    [WorkerSettings, "MeshLayout", int, tuple[str, int] | None, str | None], RankWorker
]
"""Makes the worker of a rank from (settings, layout, rank, store, log_file)."""


_SAME_SECONDS = 0.05  # ticks of the kernel are 0.01


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A rank's process, as known before its worker has started.

    `started_at` is in seconds since the machine's start, which no setting of its clock changes:
    together with the id it names one process.
    """

    hostname: str
    pid: int
    started_at: float

    def is_there(self) -> bool:
        """Whether it still holds memory; only for processes of this machine."""
        try:
            process = psutil.Process(self.pid)
            is_ours = abs(started_at(process) - self.started_at) < _SAME_SECONDS
            return is_ours and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def started_at(process: psutil.Process) -> float:
    """When it started, in seconds since the machine did; both are told by the clock of now."""
    return psutil.Process(process.pid).create_time() - psutil.boot_time()


class RankProcess:
    """Holds one rank's worker. Calls come one at a time, in order.

    Args:
        rank: which rank this is.
        log_file: where the rank logs: Python's logging, stderr (so also what C++ writes), crashes.
        ranks_on_host: how many ranks share this host's cores.
        num_threads: CPU threads of this rank; None: cores / ranks_on_host.
    """

    def __init__(
        self, rank: int, log_file: str, ranks_on_host: int = 1, num_threads: int | None = None
    ) -> None:
        self.rank = rank
        self.log_file = log_file
        self.num_threads = num_threads or max(1, usable_cores() // ranks_on_host)
        self._worker: RankWorker | None = None
        self._store: object | None = None
        self._pulse: Pulse | None = None

    def prepare(self, pulse: PulseAddress | None = None) -> ProcessInfo:
        """Send the process's output to the log, and beat; returns which process it is.

        The first call: whatever goes wrong from here on stands in the log.

        Args:
            pulse: where to beat to; the process ends if nobody answers.
        """
        log_process_to(self.log_file)
        self._pulse = None if pulse is None else Pulse(pulse, self.rank)
        return this_process()

    def ping(self) -> None:
        """Do nothing; the call fails where the process has died, and says how."""

    def open_store(self, host: str) -> tuple[str, int]:
        """Open the rendezvous store on a free port; it lives as long as this process."""
        from saqqara.workers.mesh.mesh import start_store

        store = start_store(host)
        self._store = store
        return host, store.port

    def start(
        self,
        config: EngineConfig,
        layout: "MeshLayout",
        store: tuple[str, int] | None,
        address: str,
        make_worker: WorkerFactory | None = None,
        gpu: int | None = None,
    ) -> WorkerInfo:
        """Load the shard and join the other ranks, which must start at the same time.

        Args:
            config: the engine's settings.
            layout: tensor and pipeline sizes.
            store: host and port of the rendezvous store; None for one rank.
            address: this host's address among the ranks; gloo is told to use its interface.
            make_worker: default: `saqqara.workers.worker.Worker`.
            gpu: this rank's of those that the process sees (`placement.own_gpu`), if it has one.
        """
        name = interface_of(address)
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if make_worker is None:
            make_worker = importlib.import_module("saqqara.workers.worker").Worker
            assert make_worker is not None
        from saqqara.workers.process import prepare_process

        settings = replace(config.for_worker(), num_threads=self.num_threads)
        if gpu is not None:
            os.environ["LOCAL_RANK"] = str(gpu)
        try:
            # Ray sets OMP_NUM_THREADS to 1 for actors of few CPUs.
            prepare_process(settings, self.rank)
            self._worker = make_worker(settings, layout, self.rank, store, self.log_file)
        except BaseException:
            logger.exception("rank %d could not start", self.rank)
            raise
        if self._pulse is not None:
            self._pulse.note_up()
        info = replace(self._worker.info, log_file=self.log_file)
        logger.info("rank %d has started with %d threads: %s", self.rank, self.num_threads, info)
        return info

    def execute(self, plan: bytes) -> StepResult:
        """Run this rank's part of a pickled `StepPlan`."""
        assert self._worker is not None, "execute before start"
        try:
            return self._worker.execute(pickle.loads(plan))
        except BaseException:
            logger.exception("rank %d failed", self.rank)
            raise

    def compile_grammar(self, grammar: Grammar) -> None:
        """Have a grammar ready; runs beside the steps, in the thread of its concurrency group.

        Raises:
            ValueError: it cannot be compiled.
        """
        assert self._worker is not None, "compile_grammar before start"
        self._worker.compile_grammar(grammar)

    def check_integrity(self) -> None:
        """Raise `AssertionError` if the pages are not all accounted for."""
        assert self._worker is not None, "check_integrity before start"
        self._worker.check_integrity()

    def close(self) -> None:
        """Leave the process groups; nobody needs to hear of this process any more."""
        if self._pulse is not None:
            self._pulse.close()
            self._pulse = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def this_process() -> ProcessInfo:
    """The process that asks."""
    return ProcessInfo(socket.gethostname(), os.getpid(), started_at(psutil.Process()))


def end_processes(processes: Sequence[ProcessInfo], timeout_seconds: float) -> list[int]:
    """Wait for processes of this machine that were told to end; returns ids of those still there.

    After a second they are killed: Ray gives one that is stopped far longer.
    """
    started = time.monotonic()
    while left := [process for process in processes if process.is_there()]:
        seconds = time.monotonic() - started
        if seconds > timeout_seconds:
            break
        if seconds > _GRACE_SECONDS:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    return [process.pid for process in left]


def new_log_dir(config: EngineConfig) -> Path:
    """The folder for the logs of an engine that starts now; not made here."""
    if config.log_dir is not None:
        return Path(config.log_dir).expanduser().absolute()
    return cache_dir() / "logs" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def log_process_to(path: str) -> None:
    """Send this process's logging, warnings, stderr and crash traces to a file.

    SIGUSR1 writes the stack of every thread there, which shows where a process hangs.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = file.open("a", buffering=1, encoding="utf-8")
    os.dup2(stream.fileno(), 2)
    faulthandler.enable(stream)
    faulthandler.register(signal.SIGUSR1, stream, all_threads=True)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


def interface_of(address: str) -> str | None:
    """The network interface that has an address, such as `lo` for 127.0.0.1, or None."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.split("%")[0] == address for a in addresses):
            return name
    return None

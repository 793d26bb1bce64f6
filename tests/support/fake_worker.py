"""A worker without a model: it talks over the real mesh and misbehaves when a plan says so."""

import logging
import os
import signal
import sys
import time

import torch

from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.mesh.mesh import Mesh
from saqqara.workers.plan import Grammar, StepPlan, StepResult, WorkerInfo, WorkerMemory

# What the last rank does when a plan frees this slot; the others wait for it in a collective.
RAISE, DIE, CRASH, SLEEP, WRITE = 1001, 1002, 1003, 1004, 1005
SLEEP_SECONDS = 0.5


class FakeWorker:
    """Every step is one all-reduce, so ranks that are missing are waited for."""

    def __init__(
        self,
        config: WorkerSettings,
        layout: MeshLayout,
        rank: int = 0,
        store: tuple[str, int] | None = None,
        log_file: str | None = None,
    ) -> None:
        if config.seed == 13 and rank == layout.world_size - 1:
            raise ValueError("seed must not be 13")
        assert config.num_threads is not None
        torch.set_num_threads(config.num_threads)
        self.mesh = Mesh(layout, rank, store=store)
        self.is_last = rank == layout.world_size - 1
        self.whole = True
        self.info = WorkerInfo(
            rank=rank,
            pipeline_rank=self.mesh.pipeline_rank,
            tensor_rank=self.mesh.tensor_rank,
            start_layer=0,
            stop_layer=1,
            start_head=0,
            stop_head=1,
            num_pages=torch.get_num_threads(),
            page_tokens=16,
            page_bytes=1,
            device="cpu",
            dtype="float32",
            attention_backend="fake",
            attention_reason=os.environ.get("GLOO_SOCKET_IFNAME", ""),
            linear_backend="none",
            linear_reason="",
            dtype_reason="",
            memory=WorkerMemory(),
            hostname=os.uname().nodename,
            pid=os.getpid(),
            log_file=log_file,
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """All-reduce ones: `pages_free` says how many ranks took part."""
        if self.is_last:
            self._misbehave(plan.free)
        total = self.mesh.all_reduce(torch.ones(1))
        self.mesh.barrier()
        return StepResult(plan.step, self.mesh.rank, pages_free=int(total))

    def _misbehave(self, orders: tuple[int, ...]) -> None:
        if RAISE in orders:
            raise KeyError("a bug of the worker")
        if DIE in orders:
            os.kill(os.getpid(), signal.SIGKILL)
        if CRASH in orders:
            signal.raise_signal(signal.SIGSEGV)  # in this thread, so that nothing is answered
        if SLEEP in orders:
            time.sleep(SLEEP_SECONDS)
        if WRITE in orders:
            logging.getLogger("fake").info("from logging")
            os.write(2, b"from C++\n")
            print("from stderr", file=sys.stderr)
            self.whole = False

    def compile_grammar(self, grammar: Grammar) -> None:
        """Fails for a grammar that says so."""
        if grammar.text == "bad":
            raise ValueError("bad is no grammar")

    def check_integrity(self) -> None:
        """Fails once WRITE was ordered."""
        assert self.whole, "page 7 has no owner"

    def close(self) -> None:
        """Leave the process groups."""
        self.mesh.close()

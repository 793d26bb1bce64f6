"""Runs the batches that nobody runs, one lease each, beside what clients ask for."""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from saqqara.cluster.batch_store.database import StoreBusyError
from saqqara.cluster.batch_store.leases import Lease, LeaseLostError
from saqqara.cluster.batch_store.store import Store

from .answers import Answers
from .room import Room
from .run import BatchRun

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_BATCHES = 8  # that a replica runs at once
MAX_OF_AN_OWNER = 4
_SWEEP_SECONDS = 600.0


class BatchRunner:
    """Claims batches and runs them; used in one event loop.

    Args:
        store: where they are.
        answers: what answers their lines.
        room: for lines that are under way.
        wait_closed: returns when the server takes nothing more: then batches are handed back.
        poll_seconds: between two looks for batches that nobody runs.
        again_seconds: how long a batch rests that could not be run for a fault of ours.
    """

    def __init__(
        self,
        store: Store,
        answers: Answers,
        room: Room,
        wait_closed: Callable[[], Coroutine[Any, Any, None]],
        poll_seconds: float = 1.0,
        again_seconds: float = 5.0,
    ) -> None:
        self._store = store
        self._answers = answers
        self._room = room
        self._wait_closed = wait_closed
        self._poll_seconds = poll_seconds
        self._again_seconds = again_seconds
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        # Not those of requests for files, which may be slow: leases must be renewed in time.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="batches")
        self._runs: dict[asyncio.Task[None], BatchRun] = {}
        self._wake = asyncio.Event()
        self._main: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to claim and run."""
        self._main = asyncio.ensure_future(self._until_closed())

    async def stop(self) -> None:
        """Hand back what is being run."""
        if self._main is not None:
            self._main.cancel()
            with suppress(asyncio.CancelledError):
                await self._main
        self._threads.shutdown(wait=True)

    def wake(self) -> None:
        """Look at once for what is new: a batch, or that one was cancelled."""
        self._wake.set()
        for run in self._runs.values():
            run.look()

    async def _until_closed(self) -> None:
        tasks = [asyncio.ensure_future(self._claim_and_run()), asyncio.ensure_future(self._sweep())]
        closed = asyncio.ensure_future(self._wait_closed())
        try:
            await asyncio.wait((*tasks, closed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*tasks, closed):
                task.cancel()
            await asyncio.gather(*tasks, closed, return_exceptions=True)
            for run in list(self._runs):
                run.cancel()
            await asyncio.gather(*self._runs, return_exceptions=True)

    async def _claim_and_run(self) -> None:
        while True:
            try:
                while len(self._runs) < MAX_BATCHES and (lease := await self._claim()) is not None:
                    self._begin(lease)
            except StoreBusyError as error:
                logger.warning("no batch can be claimed: %s", error)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds):
                    await self._wake.wait()
            self._wake.clear()

    async def _claim(self) -> Lease | None:
        claim = self._store.leases.claim
        running = [run.lease.batch.id for run in self._runs.values()]
        return await self._in_thread(claim, self._holder, MAX_OF_AN_OWNER, running)

    def _begin(self, lease: Lease) -> None:
        run = BatchRun(
            self._store, lease, self._answers, self._room, self._threads, self._poll_seconds
        )
        task = asyncio.ensure_future(self._run(run))
        self._runs[task] = run
        task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[None]") -> None:
        del self._runs[task]
        self._wake.set()

    async def _run(self, run: BatchRun) -> None:
        """Run a batch, and hand it back if it has not come to its end."""
        batch_id = run.lease.batch.id
        try:
            await run.run()
            logger.info("%s has ended", batch_id)
        except* LeaseLostError:
            logger.warning("%s: another runner has taken it over", batch_id)
        except* Exception:
            logger.exception("%s is handed back, and run again", batch_id)
            await asyncio.sleep(
                self._again_seconds
            )  # with the lease, so that no other fails at once
        finally:
            # A transaction of a thread that nobody waits for any more comes before this one, or
            # finds that the lease is gone.
            await self._release(run.lease)

    async def _release(self, lease: Lease) -> None:
        with suppress(StoreBusyError):  # it expires
            await self._in_thread(self._store.leases.release, lease)

    async def _sweep(self) -> None:
        while True:
            try:
                await self._in_thread(self._store.files.sweep)
            except (StoreBusyError, OSError) as error:
                logger.warning("old files cannot be deleted: %s", error)
            await asyncio.sleep(_SWEEP_SECONDS)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)

"""A server's files and batches, or none, for its paths and for its life."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.types import ASGIApp

from saqqara.cluster.batch_store.database import StoreBusyError
from saqqara.cluster.batch_store.records import NotFoundError, NotPossibleError, StoreLimitError
from saqqara.cluster.batch_store.store import Store
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.server.generation import Generation

from .answers import AppAnswers
from .room import Room
from .runner import BatchRunner

T = TypeVar("T")

_RETRY_SECONDS = 5
_SHARE = 4  # one in so many slots is left to clients' own requests


class BatchService:
    """The store of a server, and what runs its batches while the application lives.

    Args:
        store: from now on this object's; None: the server has no files and no batches.
        generation: the engine and its queue.
        poll_seconds: between two looks for batches that nobody runs.
    """

    def __init__(
        self, store: Store | None, generation: Generation, poll_seconds: float = 1.0
    ) -> None:
        self._store = store
        self._generation = generation
        self._poll_seconds = poll_seconds
        self._runner: BatchRunner | None = None
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="files")

    @property
    def store(self) -> Store:
        """The store.

        Raises:
            ApiError: (404) there is none.
        """
        if self._store is None:
            message = (
                "this server has no files and no batches; start it with --batch-dir FOLDER "
                "(batch_dir in a file)"
            )
            raise ApiError(404, message, None, "batches_off")
        return self._store

    def start(self, app: ASGIApp) -> None:
        """Begin to run batches by an application."""
        if self._store is None:
            return
        admission = self._generation.admission
        slots = admission.max_running
        most = self._store.limits.max_in_flight or max(1, slots - max(1, slots // _SHARE))
        room = Room(min(most, admission.capacity), lambda: admission.num_free)
        limits = self._generation.limits
        ends_early = limits.default_timeout_seconds is not None
        answers = AppAnswers(app, limits.max_timeout_seconds if ends_early else None)
        self._runner = BatchRunner(
            self._store, answers, room, admission.wait_closed, self._poll_seconds
        )
        self._runner.start()

    async def stop(self) -> None:
        """Hand back what is being run, and let go of the store."""
        if self._runner is not None:
            await self._runner.stop()
        self._threads.shutdown(wait=True)
        if self._store is not None:
            self._store.close()

    def wake(self) -> None:
        """Have the runner look at what is new."""
        if self._runner is not None:
            self._runner.wake()

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function of the store gives; waited for in a thread.

        Raises:
            ApiError: what it raises, for the client.
        """
        with told_to_clients():
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, function, *arguments)


@contextmanager
def told_to_clients() -> Iterator[None]:
    """Turn what the store raises into what a client is told.

    Raises:
        ApiError: instead.
    """
    try:
        yield
    except NotFoundError as error:
        raise ApiError(404, str(error), _field(error), "not_found") from None
    except StoreLimitError as error:
        raise ApiError(400, str(error), _field(error), "limit_exceeded") from None
    except NotPossibleError as error:
        raise ApiError(400, str(error), _field(error), "invalid_value") from None
    except StoreBusyError as error:
        wait = {"Retry-After": str(_RETRY_SECONDS)}
        raise ApiError(503, str(error), None, "batch_store_busy", wait) from None


def _field(error: Exception) -> str | None:
    """The field that a message of the store names in front."""
    name, colon, _ = str(error).partition(": ")
    return name if colon and name.isidentifier() else None

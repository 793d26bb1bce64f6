"""How the rest of the package talks to an engine, wherever it runs: in this process or in Ray.

The command line, batch jobs, `LLM` and the HTTP server are written against `EngineClient`.
`LocalClient` steps an `Engine` in a thread of this process; `controller.ControllerClient` speaks to
the Ray actor that owns one.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from saqqara.cluster.errors import ContextLengthError
from saqqara.cluster.presets import with_profile
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.spec import load_spec
from saqqara.workers.plan import WorkerInfo

from .engine import Engine
from .executor import Executor, LocalExecutor
from .loop import EngineLoop
from .metrics import Sink
from .model_fit import check_fits
from .report import BatchRows, EngineReport
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A request the engine did not take, and why (the message names the field)."""

    request_id: str
    error: str
    is_too_long: bool = False  # the context has no room for it


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """Facts that are known once the engine has started."""

    config: EngineConfig
    workers: tuple[WorkerInfo, ...]
    log_dir: str | None
    metrics_address: str | None
    start_seconds: float


class EngineClient(Protocol):
    """An engine, seen from outside. Methods may be called from any thread.

    Every method but `shutdown` raises `EngineDeadError` once the engine has failed.
    """

    def submit(self, requests: Sequence[Request]) -> list[Rejection]:
        """Queue requests; a bad one costs only itself and comes back as a `Rejection`."""
        ...

    def poll(self, timeout_seconds: float = 0.0) -> list[RequestOutput | ScoreOutput]:
        """Outputs since the last call, in the order they came.

        Waits up to `timeout_seconds` for the first one; an empty list means that the time is up.
        Only finished outputs, except for requests with `stream`.
        """
        ...

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop these requests and free what they hold; unknown or finished ids are ignored.

        Their last output still comes through `poll`, finished with the reason `abort`.
        """
        ...

    def report(self) -> EngineReport:
        """Measurements since the start or the last `reset_stats`."""
        ...

    def reset_stats(self) -> None:
        """Start the measurements anew (after a warm-up, say)."""
        ...

    def note_rows(self, rows: BatchRows) -> None:
        """Show in the metrics how far the batch job is that runs on this engine."""
        ...

    def end_conversation(self, conversation_id: str, owner: str = "") -> bool:
        """Give up what is kept of an owner's conversation; whether there was anything.

        Raises:
            ConversationBusyError: a turn of it has not ended.
        """
        ...

    def reset_prefix_cache(self) -> bool:
        """Give up the cached prefixes that nobody uses; whether none is left.

        Blocks that sequences or conversations use stay until these let them go.
        """
        ...

    def metrics_address(self) -> str | None:
        """Where /metrics is served, such as `127.0.0.1:8001`, or None."""
        ...

    def describe(self) -> EngineDescription:
        """Configuration, workers and addresses."""
        ...

    def shutdown(self) -> None:
        """Stop the engine and release all it holds; calling it again does nothing."""
        ...


class LocalClient:
    """An engine in this process, stepped by a thread.

    Args:
        config: the engine's settings.
        executor: where plans are carried out, the client's from now on; default: one worker in
            this process.
        sinks: where metrics go besides Prometheus.
        metrics_host: address that /metrics is served on, if `config.metrics_port` is set.

    Raises:
        ValueError: a setting that the model or the machine cannot meet.
        OSError: `config.metrics_port` is taken.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor | None = None,
        *,
        sinks: Sequence[Sink] = (),
        metrics_host: str = "127.0.0.1",
    ) -> None:
        started = time.monotonic()
        spec = load_spec(config.model)  # first, since it says best what is wrong with a folder
        check_fits(config, spec)
        config = with_profile(config)
        tokenizer = Tokenizer.load(config.tokenizer or config.model)
        executor = executor or LocalExecutor(config)
        try:
            self._engine = Engine(config, executor, tokenizer, spec, sinks=sinks)
            metrics_address = None
            if config.metrics_port is not None:
                port = self._engine.metrics.start_http_server(
                    config.metrics_port, metrics_host, self._engine.live_stats
                )
                metrics_address = f"{metrics_host}:{port}"
        except BaseException:
            executor.shutdown()
            raise
        self._loop = EngineLoop(self._engine)
        self._description = EngineDescription(
            config=self._engine.config,
            workers=tuple(executor.workers),
            log_dir=None,
            metrics_address=metrics_address,
            start_seconds=time.monotonic() - started,
        )

    def submit(self, requests: Sequence[Request]) -> list[Rejection]:
        """Queue requests; a bad one costs only itself and comes back as a `Rejection`."""
        return self._loop.call(lambda: [r for r in map(self._add, requests) if r is not None])

    def poll(self, timeout_seconds: float = 0.0) -> list[RequestOutput | ScoreOutput]:
        """Outputs since the last call; waits up to `timeout_seconds` for the first."""
        return self._loop.take(timeout_seconds)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop these requests; unknown or finished ids are ignored."""
        ids = list(request_ids)
        self._loop.call(lambda: self._engine.abort(ids))

    def report(self) -> EngineReport:
        """Measurements since the start or the last `reset_stats`."""
        return self._loop.call(self._report)

    def reset_stats(self) -> None:
        """Start the measurements anew."""
        self._loop.call(self._engine.reset_stats)

    def note_rows(self, rows: BatchRows) -> None:
        """Show in the metrics how far the batch job is that runs on this engine."""
        self._loop.call(lambda: self._engine.note_rows(rows))

    def end_conversation(self, conversation_id: str, owner: str = "") -> bool:
        """Give up what is kept of an owner's conversation; whether there was anything."""
        return self._loop.call(lambda: self._engine.end_conversation(conversation_id, owner))

    def reset_prefix_cache(self) -> bool:
        """Give up the cached prefixes that nobody uses; whether none is left."""
        return self._loop.call(self._engine.reset_prefix_cache)

    def metrics_address(self) -> str | None:
        """Where /metrics is served, or None."""
        return self._description.metrics_address

    def describe(self) -> EngineDescription:
        """Configuration, workers and addresses."""
        return self._description

    def shutdown(self) -> None:
        """Stop the engine and release all it holds; calling it again does nothing."""
        self._loop.stop()

    def _report(self) -> EngineReport:
        # A sequence's pages are freed by the step after its last output. Whoever has all outputs
        # and asks whether pages have leaked wants to know what is so after that step.
        scheduler = self._engine.scheduler
        while scheduler.num_running + scheduler.num_waiting == 0 and not scheduler.is_idle:
            self._loop.step()
        return self._engine.report()

    def _add(self, request: Request) -> Rejection | None:
        try:
            self._engine.add(request)
        except ValueError as error:
            is_too_long = isinstance(error, ContextLengthError)
            return Rejection(request.request_id, str(error), is_too_long)
        except Exception as error:  # a fault of ours; it costs this request alone
            logger.exception("request %s could not be queued", request.request_id)
            return Rejection(request.request_id, f"{type(error).__name__}: {error}")
        return None

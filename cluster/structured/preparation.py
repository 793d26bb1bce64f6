"""Requests that wait until the workers have compiled their grammar, so that no step does."""

from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from saqqara.workers.grammar.compiler import MAX_GRAMMAR_BYTES, MAX_GRAMMARS
from saqqara.workers.plan import Grammar

MAX_SECONDS = 60.0  # the first grammar of a model waits for the table of its tokens, too
MAX_LOSSES = 2  # of workers, while they compiled a grammar: it is to blame
_SLICE_SECONDS = 0.01
# Fewer than workers keep, so what is in here is with them.
_MAX_READY, _MAX_READY_BYTES = MAX_GRAMMARS // 2, MAX_GRAMMAR_BYTES // 2


class Compiles(Protocol):
    """What compiles grammars where answers are sampled."""

    def compile_grammar(self, grammar: Grammar) -> "Future[None]":
        """Have a grammar ready; the future ends with what kept it from that."""
        ...


class WaitingClock(Protocol):
    """What is needed of the engine's clock."""

    def now(self) -> float:
        """The time in seconds."""
        ...

    def wait(self, future: "Future[Any]", seconds: float) -> None:
        """Let time pass until a future is done, at most so much."""
        ...


@dataclass(slots=True, eq=False)
class _Pending:
    begun_at: float
    request_ids: list[str] = field(default_factory=list)
    future: "Future[None] | None" = None
    num_losses: int = 0


class Preparation:
    """The grammars that are being compiled, and who waits for them.

    Args:
        clock: the engine's.
        lost: the errors that tell that workers were lost, upon which others compile the grammar.
    """

    def __init__(self, clock: WaitingClock, lost: type[Exception]) -> None:
        self._clock = clock
        self._lost = lost
        self._ready: OrderedDict[Grammar, None] = OrderedDict()
        self._num_ready_bytes = 0
        self._pending: dict[Grammar, _Pending] = {}

    def begin(self, request_id: str, grammar: Grammar | None) -> bool:
        """Whether a request can be queued at once; else `settled` tells when."""
        if grammar is None:
            return True
        if grammar in self._ready:
            self._ready.move_to_end(grammar)
            return True
        pending = self._pending.setdefault(grammar, _Pending(self._clock.now()))
        pending.request_ids.append(request_id)
        return False

    def settled(self, compiles: Compiles) -> list[tuple[str, str | None]]:
        """The requests whose grammar is ready now (None), or cannot be compiled (why)."""
        settled: list[tuple[str, str | None]] = []
        for grammar, pending in list(self._pending.items()):
            if pending.future is None:
                pending.future = compiles.compile_grammar(grammar)
            is_settled, error = self._look_at(pending, pending.future)
            if not is_settled:
                continue
            del self._pending[grammar]
            if error is None:
                self._note_ready(grammar)
            settled += [(request_id, error) for request_id in pending.request_ids]
        return settled

    def wait(self) -> None:
        """Let a moment pass, at most until the oldest grammar is ready."""
        future = next((p.future for p in self._pending.values() if p.future is not None), None)
        if future is not None:
            self._clock.wait(future, _SLICE_SECONDS)

    def restart(self) -> None:
        """The workers are lost, or new: they have compiled nothing."""
        self._ready.clear()
        self._num_ready_bytes = 0
        for pending in self._pending.values():
            if pending.future is not None:
                pending.future = None
                pending.num_losses += 1

    def _look_at(self, pending: _Pending, future: "Future[None]") -> tuple[bool, str | None]:
        """Whether it is known what becomes of a grammar, and its error."""
        if pending.num_losses >= MAX_LOSSES:
            return True, f"workers were lost {pending.num_losses} times while they compiled it"
        if not future.done():
            seconds = self._clock.now() - pending.begun_at
            return seconds > MAX_SECONDS, f"it is not compiled after {seconds:.0f} s"
        error = future.exception()
        if isinstance(error, self._lost):
            return False, None  # the engine hears of it, and `restart` is called
        return True, None if error is None else str(error)

    def _note_ready(self, grammar: Grammar) -> None:
        self._ready[grammar] = None
        self._num_ready_bytes += len(grammar.text)
        while len(self._ready) > _MAX_READY or self._num_ready_bytes > _MAX_READY_BYTES:
            dropped, _ = self._ready.popitem(last=False)
            self._num_ready_bytes -= len(dropped.text)

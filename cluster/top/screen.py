"""What `saqqara top` does: one snapshot, lines of JSON, or a screen that follows the engine."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from saqqara.cluster.live.snapshot import LiveStats

from .source import NoAnswerError, Source
from .view import Look, draw, waiting

_PLAIN_WIDTH = 100  # where there is no terminal
_NAMED_SECONDS = 30.0  # a replica that has not answered for so long is not counted any more


def print_once(source: Source, *, as_json: bool, file: TextIO | None = None) -> None:
    """Print one snapshot, in lines or as JSON.

    Raises:
        NoAnswerError, WrongAnswerError, WrongKeyError: see `Source.read`.
    """
    file = sys.stdout if file is None else file
    stats = source.read()
    if as_json:
        file.write(stats.model_dump_json() + "\n")
    elif file.isatty():
        console = Console(file=file)
        look = Look(console.width, plain=not console.encoding.startswith("utf"))
        console.print(Group(*draw(stats, look)))
    else:
        lines = draw(stats, Look(_PLAIN_WIDTH, plain=True))
        file.write("".join(f"{line.plain}\n" for line in lines))
    file.flush()


def print_lines(source: Source, interval: float) -> None:
    """Print a line of JSON every `interval` seconds until something ends it.

    Raises:
        NoAnswerError, WrongAnswerError, WrongKeyError: see `Source.read`.
    """
    while True:
        print_once(source, as_json=True)
        time.sleep(interval)


def follow(source: Source, interval: float, console: Console | None = None) -> None:
    """Draw the engine on the whole terminal until Ctrl-C, which leaves it as it was.

    An engine that is not there yet, or not any more, is waited for.

    Raises:
        KeyboardInterrupt: that is how it ends.
        WrongAnswerError, WrongKeyError: see `Source.read`.
    """
    console = Console() if console is None else console
    seen = _Seen(source)
    with (
        _wakened() as wakeup,
        Live(console=console, screen=True, auto_refresh=False, transient=True) as live,
    ):
        due = 0.0
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + interval
                seen.look_again()
            plain = not console.encoding.startswith("utf")
            look = Look(console.width, console.height, plain)
            live.update(Group(*seen.lines(look)), refresh=True)
            with suppress(Empty):
                wakeup.get(timeout=max(due - time.monotonic(), 0))


class _Seen:
    """What has been seen of an engine so far."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._latest: LiveStats | None = None
        self._before: dict[str, LiveStats] = {}  # the snapshot before the latest, by replica
        self._last: dict[str, tuple[float, LiveStats]] = {}
        self._trouble: str | None = None
        self._since = time.monotonic()

    def look_again(self) -> None:
        """Ask the engine."""
        try:
            stats = self._source.read()
        except NoAnswerError as error:
            if self._trouble is None:
                self._since = time.monotonic()
            self._trouble = str(error)
            self._last.clear()  # whoever answers next may be another
            return
        self._trouble = None
        name = stats.replica.id
        if name in self._last and self._last[name][1].time != stats.time:
            self._before[name] = self._last[name][1]
        self._last[name] = (time.monotonic(), stats)
        self._latest = stats

    def lines(self, look: Look) -> list[Text]:
        """What to draw."""
        if self._latest is None:
            text = f"waiting for {self._source.address}: {self._trouble} (Ctrl-C ends this)"
            return waiting(text, look)
        notice = None
        if self._trouble is not None:
            seconds = time.monotonic() - self._since
            notice = f"gone for {seconds:.0f} s, trying again: {self._trouble}"
        elif (others := self._num_replicas() - 1) > 0:
            notice = f"one of {others + 1} replicas that answer here in turns"
        stats = self._latest
        before = self._before.get(stats.replica.id)
        return draw(stats, look, before=before, notice=notice, now=time.time())

    def _num_replicas(self) -> int:
        newest = time.monotonic() - _NAMED_SECONDS
        self._last = {name: seen for name, seen in self._last.items() if seen[0] > newest}
        return len(self._last)


@contextmanager
def _wakened() -> Iterator[SimpleQueue[int]]:
    """A queue that a change of the terminal's size puts into; SIGTERM ends as Ctrl-C does."""
    wakeup: SimpleQueue[int] = SimpleQueue()  # the lock of an Event could be held by who waits

    def resized(signum: int, frame: FrameType | None) -> None:
        wakeup.put(signum)

    def ended(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    handlers = {signal.SIGWINCH: resized, signal.SIGTERM: ended}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield wakeup
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

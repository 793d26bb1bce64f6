"""Ends a job cleanly on SIGTERM, SIGINT or SIGHUP."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

# One stop may come as two signals (`timeout` sends to the process, then to its group).
_SAME_STOP_SECONDS = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal has ended the job. `exit_code` is what a shell would report of it, 128 + signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopSignals:
    """While it is entered, the first signal is noted or raised as `Stopped`; a second one kills.

    In another thread than the main one nothing is changed: signals are the main thread's. Signals
    that are ignored (`nohup`) stay so.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_time = 0.0
        self._raises = True
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                old = signal.getsignal(signum)
                if old is not signal.SIG_IGN:
                    self._old[signum] = old
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, old in self._old.items():
            signal.signal(signum, signal.SIG_DFL if old is None else old)

    def listen(self) -> None:
        """Listen again: connecting to Ray puts a handler of its own in place of ours."""
        for signum in self._old:
            signal.signal(signum, self._handle)

    def check(self) -> None:
        """Raise `Stopped` if a signal has come (one that is raised amid a callback gets lost)."""
        if self.received is not None:
            raise Stopped(self.received)

    @property
    def name(self) -> str:
        """The signal that has come."""
        return "nothing" if self.received is None else signal.Signals(self.received).name

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Here a first signal is only noted, for `check`."""
        self._raises = False
        try:
            yield
        finally:
            self._raises = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_time = signum, now
            if self._raises:
                raise Stopped(signum)
        elif now - self._received_time > _SAME_STOP_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

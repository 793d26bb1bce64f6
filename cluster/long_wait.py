"""Says that something is still going on, where nothing else has for some seconds."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Self

logger = logging.getLogger(__name__)

QUIET_SECONDS = 4.0


class LongWait(logging.Handler):
    """While it is entered, at least one line is logged every few seconds.

    Args:
        what: what is waited for, or a function that says it.
        quiet_seconds: how long the package's log may be silent before `what` is logged.
    """

    def __init__(self, what: str | Callable[[], str], quiet_seconds: float = QUIET_SECONDS) -> None:
        super().__init__(logging.INFO)
        self._what = what
        self._quiet_seconds = quiet_seconds
        self._started = self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="long-wait", daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Note that something was logged."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        self._started = self._last = time.monotonic()
        logging.getLogger("saqqara").addHandler(self)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        logging.getLogger("saqqara").removeHandler(self)
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._last + self._quiet_seconds - time.monotonic()):
            now = time.monotonic()
            if now - self._last >= self._quiet_seconds:
                what = self._what if isinstance(self._what, str) else self._what()
                logger.info("%s: %.0f s so far", what, now - self._started)
                self._last = now

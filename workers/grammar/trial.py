"""Whether a grammar can be compiled at all, found out where it can do no harm.

llguidance bounds what a grammar costs, but not in every way: a chain of thousands of rules or
references overflows its stack, and some intersections take it for ever. So each grammar is tried
out in another process first (`trial_process.py`), which such a grammar ends alone.
"""

import atexit
import json
import select
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from .compiler import LIMITS

CPU_SECONDS = 3
WAIT_SECONDS = 60.0  # for a process that gets no time of the machine; its own limit is on CPU time
_FILE = Path(__file__).with_name("trial_process.py")
_TOO_COSTLY = "it takes too much time or memory to compile; make it smaller"
_TOO_DEEP = "its rules, or references, are nested too deep"


class Trial:
    """A process that tries grammars out, one after the other; started when the first one comes.

    Its methods may be called from any thread.

    Args:
        cpu_seconds: that a grammar may take, rounded up to whole ones of the process.
    """

    def __init__(self, cpu_seconds: int = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def error_of(self, text: str) -> str | None:
        """What is wrong with a grammar, or None."""
        with self._lock:
            process = self._process or self._start()
            try:
                _send(process, text)
                answer = _answer(process)
            except OSError:  # it has ended before it has read all of it
                answer = b""
            if answer:
                error: str | None = json.loads(answer)
                return error
            self._end()
            return _TOO_DEEP if process.returncode == -signal.SIGSEGV else _TOO_COSTLY

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _start(self) -> "subprocess.Popen[bytes]":
        self._process = subprocess.Popen(
            [sys.executable, str(_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )
        _send(self._process, [self._cpu_seconds, LIMITS])
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(0.1)  # how it has ended says why
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()


@cache
def shared_trial() -> Trial:
    """This process's own."""
    trial = Trial()
    atexit.register(trial.close)
    return trial


def _send(process: "subprocess.Popen[bytes]", value: object) -> None:
    assert process.stdin is not None, "it has a pipe"
    process.stdin.write(json.dumps(value, allow_nan=False).encode() + b"\n")
    process.stdin.flush()


def _answer(process: "subprocess.Popen[bytes]") -> bytes:
    """A line; empty if the process ends, or does not answer."""
    assert process.stdout is not None, "it has a pipe"
    if not select.select([process.stdout], [], [], WAIT_SECONDS)[0]:
        return b""
    return process.stdout.readline()

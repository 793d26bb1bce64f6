"""A command on a terminal of its own, as a person sees it."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

WAIT_SECONDS = 120.0
ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
SHOW_CURSOR = "\x1b[?25h"
HOME = "\x1b[H"
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """The other end of a command's terminal.

    Attributes:
        process: the command.
        output: all that it has written.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", master: int) -> None:
        self.process = process
        self.output = ""
        self._master = master
        # Ctrl-C makes the terminal drop what is not read yet, in the middle of a character, too.
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def wait_for(self, seen: Callable[[list[str]], bool], what: str) -> list[str]:
        """The first screen of which this is true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            if not self._read():
                break
            screen = self.screen()
            if seen(screen):
                return screen
        raise AssertionError(f"no {what}; the last screen was\n" + "\n".join(self.screen()))

    def screen(self) -> list[str]:
        """The lines of the last whole screen: what stands between two ways home."""
        screens = self.output.split(HOME)
        last = screens[-2] if len(screens) > 2 else screens[-1]
        return [line.rstrip() for line in _CODES.sub("", last).splitlines()]

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def settings(self) -> list[object]:
        """How the terminal is set: echo, line editing, ..."""
        return termios.tcgetattr(self._master)

    def end(self) -> int:
        """Read to the end; the exit status."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self._read():
            assert time.monotonic() < deadline, "the command does not end"
        return self.process.wait(WAIT_SECONDS)

    def _read(self) -> bool:
        """Take in what was written; false if nothing more will be."""
        ready, _, _ = select.select([self._master], [], [], 0.2)
        if not ready:
            return self.process.poll() is None
        try:
            data = os.read(self._master, 65536)
        except OSError:  # nobody has the other end open any more
            return False
        self.output += self._decode(data)
        return bool(data)


@contextmanager
def on_terminal(
    command: Sequence[str],
    *,
    columns: int = 100,
    lines: int = 30,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Terminal]:
    """Start a command on a terminal of this size."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    hidden = ("COLUMNS", "LINES", "SAQQARA_API_KEY", "SAQQARA_API_KEYS", "NO_COLOR")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONUTF8": "1", **(variables or {})}

    def own_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in a shell's background ignores it
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=env, preexec_fn=own_terminal
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(master)

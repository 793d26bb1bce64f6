"""A `saqqara serve` of our own on this machine, and a light HTTP client for it.

The client speaks just enough HTTP to tell when the first event of a stream comes and when the last,
so that it takes little of the processor that the server is measured on.
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .local_ray import environment, show

START_SECONDS = 300.0
STOP_SECONDS = 120.0
READ_BYTES = 65536


@dataclass(frozen=True)
class Exchange:
    """One request and its answer: status (0: the connection broke), times in seconds.

    `first_seconds` is when the first event of a stream came, or the first byte of a body, and
    `piece_seconds` when each piece of it did. Events that came together are one piece.
    """

    status: int
    first_seconds: float
    seconds: float
    body: bytes
    piece_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class LocalServer:
    """A running server: its port, its process."""

    port: int
    process: "subprocess.Popen[bytes]"

    def get(self, path: str) -> str:
        """The body of a GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        pattern = re.compile(rf"^{re.escape(name)}\{{.*\}} (\S+)$", re.MULTILINE)
        return sum(float(value) for value in pattern.findall(self.get("/metrics")))

    def replicas(self) -> list[psutil.Process]:
        """The processes that hold the engines."""
        ours = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in ours if "ServeReplica" in _title(p)]

    def ranks(self) -> list[psutil.Process]:
        """The processes of engines that have ranks of their own."""
        ours = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in ours if "RankProcess" in _title(p)]

    async def post(
        self,
        path: str,
        body: bytes | Mapping[str, Any],
        *,
        leave_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        pause_seconds: float = 0.0,
    ) -> Exchange:
        """POST and read the answer.

        Args:
            path: of the request.
            body: as it is, or sent as JSON.
            leave_after: close the connection so many seconds on.
            headers: beside the usual ones.
            pause_seconds: wait so long after each piece: a slow reader.
        """
        content = body if isinstance(body, bytes) else json.dumps(body, allow_nan=False).encode()
        given = {"Host": "127.0.0.1", "Content-Type": "application/json", "Connection": "close"}
        given |= {"Content-Length": str(len(content)), **(headers or {})}
        return await self._exchange("POST", path, given, content, leave_after, pause_seconds)

    async def ask(self, path: str) -> Exchange:
        """GET and read the answer."""
        return await self._exchange("GET", path, {"Host": "127.0.0.1", "Connection": "close"})

    async def _exchange(
        self,
        method: str,
        path: str,
        given: Mapping[str, str],
        content: bytes = b"",
        leave_after: float | None = None,
        pause_seconds: float = 0.0,
    ) -> Exchange:
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in given.items())]
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
            async with asyncio.timeout(leave_after):
                return await _read_answer(reader, started, pause_seconds)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            return Exchange(0, 0.0, time.perf_counter() - started, b"")
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def _read_answer(
    reader: asyncio.StreamReader, started: float, pause_seconds: float = 0.0
) -> Exchange:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    times = []
    pieces = []
    while piece := await reader.read(READ_BYTES):
        if pause_seconds:
            await asyncio.sleep(pause_seconds)
        times.append(time.perf_counter() - started)
        pieces.append(piece)
    seconds = time.perf_counter() - started
    first = times[0] if times else 0.0
    return Exchange(status, first, seconds, b"".join(pieces), tuple(times))


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextmanager
def local_server(*arguments: str) -> Iterator[LocalServer]:
    """Start `saqqara serve` with these arguments on a free port and a Ray of its own.

    Raises:
        RuntimeError: it did not start; its log is in the message.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    command = [sys.executable, "-m", "saqqara.cli", "serve", *arguments]
    command += ["--port", str(port)]
    show(command)
    # Unix sockets lie below, so its path must be short.
    with tempfile.TemporaryDirectory(prefix="sq-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=environment() | {"RAY_TMPDIR": folder},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = LocalServer(port, process)
        try:
            _wait_until_up(server, log)
            yield server
        finally:
            _end(process)


def _wait_until_up(server: LocalServer, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        with suppress(urllib.error.URLError, OSError):
            server.get("/health")
            return
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start; it said:\n{log.read_text(errors='replace')}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

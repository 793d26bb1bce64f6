"""A real `saqqara serve` in a process of its own, on a Ray of its own, for as long as a test."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 240.0
STOP_SECONDS = 60.0
LEAVE_SECONDS = 10.0  # for what ends by itself when the server has
STACK_SECONDS = 1.0
LOG_END_CHARS = 4000
OUR_ACTORS = ("ray::ServeReplica", "ray::RankProcess")


@dataclass(frozen=True)
class Answer:
    """An answer, whatever its status; names of headers are in lower case."""

    status: int
    text: str
    headers: Mapping[str, str]


def fetch(
    url: str,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: Any = None,
    timeout: float = 60,
) -> Answer:
    """The answer to a request; the body is sent as JSON."""
    data = None if body is None else json.dumps(body).encode()
    given = {**({} if body is None else {"Content-Type": "application/json"}), **(headers or {})}
    request = urllib.request.Request(url, data, given, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return Answer(answer.status, answer.read().decode(), _by_name(answer))
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(), _by_name(error))


def _by_name(answer: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in answer.headers.items()}


@dataclass(frozen=True)
class Server:
    """A running server: where it is, and its process."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path
    ray_folder: Path

    @property
    def port(self) -> int:
        """The port of the address."""
        return int(self.url.rpartition(":")[2])

    def stop(self) -> int:
        """Ask the server to finish and end; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET."""
        answer = fetch(f"{self.url}{path}", timeout=10)
        return answer.status, answer.text

    def metric(self, name: str) -> float:
        """The sum of the series that start so: a name, or a name with the first of its labels."""
        start = name if "{" in name else name + "{"
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))

    def ray_logs(self) -> str:
        """All that Ray and Serve have logged."""
        return "".join(f.read_text(errors="replace") for f in self._ray_files("*"))

    def traces(self, rank_logs: Path) -> str:
        """Why the server may have failed or hung: what its processes do, and the ends of its logs.

        Args:
            rank_logs: the folder of `engine_kwargs.log_dir`.
        """
        for process in self._processes():
            with suppress(psutil.Error):  # it has ended meanwhile
                process.send_signal(signal.SIGUSR1)
        time.sleep(STACK_SECONDS)
        files = [self.log, *sorted(rank_logs.glob("*.log"))]
        files += [*self._ray_files("serve/*.log"), *self._ray_files("worker-*.err")]
        ends = {f: f.read_text(errors="replace")[-LOG_END_CHARS:] for f in files}
        return "".join(f"\n===== {f.name}\n{end}" for f, end in ends.items() if end)

    @contextmanager
    def traced(self, rank_logs: Path) -> Iterator[None]:
        """Put the traces into the message of whatever fails within."""
        try:
            yield
        except Exception as error:
            message = f"{type(error).__name__}: {error}\n{self.traces(rank_logs)}"
            raise AssertionError(message) from error

    def left_behind(self) -> list[psutil.Process]:
        """Processes that the server started, wherever they are now; itself not among them."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get("RAY_TMPDIR") == str(self.ray_folder)
                if ours and process.pid != self.process.pid:
                    found.append(process)
        return found

    def _processes(self) -> Iterator[psutil.Process]:
        """Those that write the stacks of their threads on SIGUSR1: server, replicas and ranks."""
        with suppress(psutil.NoSuchProcess):
            server = psutil.Process(self.process.pid)
            yield server
            for process in server.children(recursive=True):
                with suppress(psutil.Error):
                    if " ".join(process.cmdline()).startswith(OUR_ACTORS):
                        yield process

    def _ray_files(self, pattern: str) -> list[Path]:
        """Log files of Ray."""
        found = self.ray_folder.glob(f"**/session_2*/logs/**/{pattern}")
        return sorted({f for f in found if f.is_file()})


@contextmanager
def running_server(log: Path, *arguments: str, keys: str | None = None) -> Iterator[Server]:
    """Start `saqqara serve` and wait until it takes requests; ended, if it has not, afterwards."""
    with starting_server(log, *arguments, keys=keys) as server:
        wait_until_up(server)
        yield server


@contextmanager
def starting_server(
    log: Path,
    *arguments: str,
    keys: str | None = None,
    port: int | None = None,
    ray_address: str | None = None,
) -> Iterator[Server]:
    """Start `saqqara serve` and do not wait.

    It must end when it is asked to, and leave no process behind.

    Args:
        log: what it prints.
        arguments: of the command.
        keys: API keys.
        port: its port; default: a free one.
        ray_address: of a cluster; default: a Ray of its own.
    """
    port = port or free_port()
    # Unix sockets lie below, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="sq-", ignore_cleanup_errors=True) as folder:
        env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "SAQQARA_API_KEYS")}
        env |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        if keys is not None:
            env["SAQQARA_API_KEYS"] = keys
        if ray_address is not None:
            env["RAY_ADDRESS"] = ray_address
        command = [sys.executable, "-m", "saqqara.cli", "serve", *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--port", str(port)],
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Server(f"http://127.0.0.1:{port}", process, log, Path(folder))
        try:
            yield server
        finally:
            _end(server)


def wait_until_up(server: Server) -> None:
    """Wait until a server that was started takes requests."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if server.get("/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the server did not start; it said:\n{server.log.read_text()}")


def _end(server: Server) -> None:
    """End the server and every process that it started, of which none may be left by then."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(STOP_SECONDS)
    ended = server.process.poll() is not None
    _, left = psutil.wait_procs(server.left_behind(), timeout=LEAVE_SECONDS)
    names = [process.name() for process in left if process.is_running()]
    with suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    server.process.wait()
    assert ended, f"the server did not end within {STOP_SECONDS:g} s"
    assert not names, f"the server left processes behind: {names}"


@contextmanager
def half_sent_requests(server: Server, count: int, key: str = "-") -> Iterator[list[socket.socket]]:
    """Connections that have sent half of a request's body, for which the server waits."""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        "Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
    )
    with ExitStack() as stack:
        connections = []
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            connections.append(stack.enter_context(connection))
            connection.sendall(head.encode() + b'{"model": ')
        for connection in connections:  # asked to go on: the server has begun to read the body
            assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        yield connections


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port

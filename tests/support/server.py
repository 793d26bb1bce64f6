"""A real `saqqara serve` in a process of its own, on a Ray of its own, for as long as a test."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 240.0
STOP_SECONDS = 60.0
STACK_SECONDS = 1.0
LOG_END_CHARS = 4000
OUR_ACTORS = ("ray::ServeReplica", "ray::RankProcess")


@dataclass(frozen=True)
class Server:
    """A running server: where it is, and its process."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path
    ray_folder: Path

    def stop(self) -> int:
        """Ask the server to finish and end; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

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
    port = free_port()
    # Unix sockets lie below, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="sq-", ignore_cleanup_errors=True) as folder:
        env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "SAQQARA_API_KEYS")}
        env |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        if keys is not None:
            env["SAQQARA_API_KEYS"] = keys
        command = [sys.executable, "-m", "saqqara.cluster.cli", "serve", *arguments]
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
            _wait_until_up(server)
            yield server
        finally:
            _end(server)


def _wait_until_up(server: Server) -> None:
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
    """End the server and, in any case, every process that it started."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port

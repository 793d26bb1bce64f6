"""A real Prometheus server for tests, and the queries they ask it."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WAIT_SECONDS = 120.0


def find_binary(name: str) -> str:
    """The path of `prometheus` or `promtool`; skips the test without it, but fails in CI."""
    binary = shutil.which(name)
    if binary is None:
        reason = f"no `{name}` on the PATH (apt-get install prometheus)"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; CI must have it")
        pytest.skip(reason)
    return binary


@contextmanager
def running(config: Mapping[str, Any], folder: Path, num_targets: int) -> Iterator[str]:
    """The address of a server with this configuration that has scraped all its targets."""
    binary = find_binary("prometheus")
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: process.poll() is not None or is_up(address, num_targets))
        assert process.poll() is None, (folder / "log").read_text()
        yield address
    finally:
        process.terminate()
        process.wait(30)


def query(address: str, expression: str) -> list[dict[str, Any]]:
    """Result of an instant query."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return result


def is_up(address: str, num_targets: int) -> bool:
    """Whether Prometheus has scraped all its targets."""
    try:
        series = query(address, "up")
    except OSError:
        return False
    return [s["value"][1] for s in series] == ["1"] * num_targets


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is true, at most `WAIT_SECONDS`."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_SECONDS:g} s"
        time.sleep(0.2)


def free_port() -> int:
    """A port that was free a moment ago: Prometheus does not tell which one it takes for 0."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port

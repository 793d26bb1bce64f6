"""A Ray head of our own on this machine, with job submission, for as long as a script needs it."""

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(sys.executable).parent  # where `ray` and `saqqara` of this environment are
START_SECONDS = 180
STOP_SECONDS = 30


def environment() -> dict[str, str]:
    """This process's environment, with the programs of this virtual environment first."""
    own = {
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    without = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}  # no other cluster of the user's
    return {k: v for k, v in os.environ.items() if k not in without} | own


def show(command: list[str]) -> None:
    """Print a command as it could be typed."""
    print(f"\n$ {shlex.join(command)}", flush=True)


@dataclass(frozen=True)
class RayHead:
    """A running head: where it takes jobs, where drivers connect, and the environment for both."""

    address: str
    gcs_address: str
    env: dict[str, str]


@contextmanager
def ray_head(num_cpus: int, object_store_bytes: int = 200 * 2**20) -> Iterator[RayHead]:
    """Start a Ray head on free ports, its dashboard on loopback, with an access token of its own.

    `ray stop` would stop every Ray on the machine; this one is stopped through its own process.

    Raises:
        RuntimeError: Ray did not come up in time; its log is in the message.
    """
    folder = Path(tempfile.mkdtemp(prefix="sq-"))  # short: Ray puts sockets below it
    token = folder / "token"
    token.touch(mode=0o600)
    secret = secrets.token_hex(32)
    token.write_text(secret, encoding="ascii")
    env = environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    gcs, dashboard, client, agent, agent_grpc = _free_ports(5)
    command = ["ray", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--port", str(gcs), "--num-cpus", str(num_cpus)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--ray-client-server-port", str(client)]
    command += ["--dashboard-agent-listen-port", str(agent)]
    command += ["--dashboard-agent-grpc-port", str(agent_grpc)]
    command += ["--object-store-memory", str(object_store_bytes), "--temp-dir", str(folder)]
    show(command)
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_until_up(address, secret, head, log)
        yield RayHead(address, f"127.0.0.1:{gcs}", env)
    finally:
        _stop(head)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(address: str, token: str, head: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a job is taken; the head answers some seconds before an agent can run one."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    body = json.dumps({"entrypoint": "true"}).encode()
    request = urllib.request.Request(f"{address}/api/jobs/", data=body, headers=headers)
    deadline = time.monotonic() + START_SECONDS
    answer = ""
    while time.monotonic() < deadline and head.poll() is None:
        try:
            with opener.open(request, timeout=30):
                return
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
        except (urllib.error.URLError, OSError) as error:
            answer = str(error)
        time.sleep(0.5)
    said = log.read_text(errors="replace")
    raise RuntimeError(f"Ray takes no job ({answer.strip()}); it said:\n{said}")


def _stop(head: "subprocess.Popen[bytes]") -> None:
    """End the head, which ends its children, and wait for it."""
    if head.poll() is None:
        head.send_signal(signal.SIGTERM)
    try:
        head.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()

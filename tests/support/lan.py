"""A network of Ray nodes on this machine, each in a network namespace, whose lines can be cut.

It takes a kernel that lets us make bridges: root, and `ip`.
"""

import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

START_SECONDS = 300.0
# Given ports, a raylet does not wait for its agents, which a busy machine starts too slowly for it.
AGENT_PORTS = {
    "dashboard_agent_listen_port": 28301,
    "metrics_agent_port": 28302,
    "metrics_export_port": 28303,
    "runtime_env_agent_port": 28304,
}
_PORT_FLAGS = (
    "--dashboard-agent-listen-port=28301 --dashboard-agent-grpc-port=28302 "
    "--metrics-export-port=28303 --runtime-env-agent-port=28304"
)


class Node:
    """A namespace with a raylet in it.

    Args:
        lan: the network's name.
        host: the node's address.
        number: of the node, 2 or more.
        folder: for its files.
    """

    def __init__(self, lan: str, host: str, number: int, folder: Path) -> None:
        self.host = host
        self._name = f"{lan}n{number}"
        self._line = f"{lan}v{number}"
        self._folder = folder / f"node-{number}"
        self._folder.mkdir(exist_ok=True)
        self._command: list[str] = []
        self._started: list[subprocess.Popen[bytes]] = []
        inner = f"{lan}p{number}"
        ip(f"netns add {self._name}")
        ip(f"link add {self._line} type veth peer name {inner} netns {self._name}")
        ip(f"link set {self._line} master {lan}")
        ip(f"netns exec {self._name} ip addr add {self.host}/24 dev {inner}")
        ip(f"netns exec {self._name} ip link set {inner} up")
        ip(f"netns exec {self._name} ip link set lo up")
        self.mend()

    def start_ray(self, address: str, resources: str) -> None:
        """Start a raylet that joins the cluster at an address.

        Args:
            address: of the head.
            resources: flags of `ray start`.
        """
        # Nodes of one machine would share a folder, where Ray keeps the address of *the* node.
        inside = (
            f"mount --bind {self._folder} /tmp/ray && exec {Path(sys.executable).parent}/ray start "
            f"--address={address} --node-ip-address={self.host} {resources} {_PORT_FLAGS} "
            "--object-store-memory=100000000 --block"
        )
        self._command = ["ip", "netns", "exec", self._name, "sh", "-c", inside]
        self._start()

    def start_again_if_ended(self) -> None:
        """Start the raylet again where it gave up, as it does on a busy machine."""
        if self._started[-1].poll() is not None:
            self._start()

    def _start(self) -> None:
        with (self._folder / "start.log").open("ab") as log:
            self._started.append(
                subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
            )

    def cut(self) -> None:
        """Take the line down: nothing comes through, and nobody is told."""
        ip(f"link set {self._line} down")

    def mend(self) -> None:
        """Put the line up."""
        ip(f"link set {self._line} up")

    def processes(self) -> list[psutil.Process]:
        """What runs inside."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._name], check=True, capture_output=True, text=True
        )
        found = []
        for pid in map(int, listed.stdout.split()):
            try:
                found.append(psutil.Process(pid))
            except psutil.NoSuchProcess:
                continue
        return found

    def actors(self, name: str) -> list[psutil.Process]:
        """Processes of actors of this class inside."""
        found = []
        for process in self.processes():
            try:
                if "".join(process.cmdline()).startswith(f"ray::{name}"):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        """End what runs inside, and the namespace, and its line with it."""
        deadline = time.monotonic() + 30.0
        while processes := self.processes():
            assert time.monotonic() < deadline, processes
            for process in processes:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.1)
        for started in self._started:
            started.wait()
        ip(f"netns del {self._name}")


class Lan:
    """A bridge, which has the head's address, and the nodes at it.

    Name and addresses are drawn, so that what a killed run left behind is in nobody's way.

    Args:
        folder: for the files of the nodes.
    """

    def __init__(self, folder: Path) -> None:
        self._name = new_name()
        self._network = f"10.213.{random.SystemRandom().randrange(256)}"
        self._folder = folder
        self.head = f"{self._network}.1"
        self.nodes: list[Node] = []
        ip(f"link add {self._name} type bridge")
        ip(f"addr add {self.head}/24 dev {self._name}")
        ip(f"link set {self._name} up")

    def add(self) -> Node:
        """Another namespace, with nothing in it."""
        number = 2 + len(self.nodes)
        node = Node(self._name, f"{self._network}.{number}", number, self._folder)
        self.nodes.append(node)
        return node

    def close(self) -> None:
        """End all."""
        for node in self.nodes:
            node.close()
        ip(f"link del {self._name}")


def new_name() -> str:
    """A name that no network has, short enough for the interfaces named after it."""
    return f"sq{secrets.token_hex(3)}"


def why_none() -> str | None:
    """What keeps this machine from having such a network; None: nothing."""
    name = new_name()
    try:
        ip(f"link add {name} type bridge")
        ip(f"link del {name}")
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def ip(command: str) -> None:
    """Run `ip`.

    Args:
        command: its arguments.

    Raises:
        RuntimeError: with what it says, where it fails.
    """
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {command}: {done.stderr.strip()}")

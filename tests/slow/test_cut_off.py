"""A process whose node is cut off the network: its listener knows in seconds, and it ends itself.

The node is a network namespace of this machine, which takes root and `ip`.
"""

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from queue import SimpleQueue

import pytest
from support.lan import ip, new_name, why_none

from saqqara.cluster.recovery.pulse import CUT_OFF_SECONDS, EXIT_STATUS, PulseMonitor

pytestmark = [pytest.mark.slow, pytest.mark.ray]

HERE, THERE = "10.214.77.1", "10.214.77.2"
NOTICE_SECONDS = 10.0
START_SECONDS = 120.0
PROCESS = """
import sys, time
from saqqara.cluster.recovery.pulse import Pulse, PulseAddress

pulse = Pulse(
    PulseAddress(sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])),
    int(sys.argv[4]),
    float(sys.argv[5]),
)
pulse.note_up()
time.sleep(600)
"""


@pytest.fixture
def link() -> Iterator[str]:
    """Our end of the line to a node of its own, which is the namespace `<link>n`."""
    if reason := why_none():
        pytest.skip(f"needs a network of its own: {reason}")
    name = new_name()
    ip(f"netns add {name}n")
    try:
        ip(f"link add {name} type veth peer name {name}p netns {name}n")
        ip(f"addr add {HERE}/30 dev {name}")
        ip(f"link set {name} up")
        ip(f"netns exec {name}n ip addr add {THERE}/30 dev {name}p")
        ip(f"netns exec {name}n ip link set {name}p up")
        yield name
    finally:
        ip(f"netns del {name}n")  # the line goes with it


def test_ranks_and_controllers_that_are_cut_off_are_lost_and_end_themselves(link: str) -> None:
    losses: SimpleQueue[tuple[int, bool]] = SimpleQueue()
    monitor = PulseMonitor(HERE, lambda rank, is_closed: losses.put((rank, is_closed)))
    address = monitor.address
    command = ["ip", "netns", "exec", f"{link}n", sys.executable, "-c", PROCESS]
    command += [HERE, str(address.port), address.token.hex()]
    # A rank, and a controller, which bears a driver that is stopped for long.
    processes = [
        subprocess.Popen([*command, str(number), str(cut_off_seconds)])
        for number, cut_off_seconds in enumerate((CUT_OFF_SECONDS, math.inf))
    ]
    try:
        deadline = time.monotonic() + START_SECONDS
        while [peer.is_up for peer in list(monitor._peers.values())] != [True, True]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(2.0)
        assert losses.empty()
        ip(f"link set {link} down")
        started = time.monotonic()
        assert losses.get(timeout=NOTICE_SECONDS) in ((0, False), (1, False))
        for process in processes:
            assert process.wait(2 * CUT_OFF_SECONDS) == EXIT_STATUS, "nobody else could end it"
        assert time.monotonic() - started >= CUT_OFF_SECONDS / 2
    finally:
        for process in processes:
            process.kill()
            process.wait()
        monitor.close()

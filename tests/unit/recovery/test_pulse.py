"""Ranks and their controller hear of each other's end: by closed connections, or by silence."""

import math
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue

import pytest

from saqqara.cluster.recovery.pulse import (
    BEAT_SECONDS,
    EXIT_STATUS,
    Pulse,
    PulseAddress,
    PulseMonitor,
)

Loss = tuple[int, bool]
SILENT = 1.5
PATIENCE = 20.0  # on a busy machine


@pytest.fixture
def losses() -> SimpleQueue[Loss]:
    return SimpleQueue()


@pytest.fixture
def monitor(losses: SimpleQueue[Loss]) -> Iterator[PulseMonitor]:
    def note(rank: int, is_closed: bool) -> None:
        losses.put((rank, is_closed))

    monitor = PulseMonitor("127.0.0.1", note, SILENT, 2 * SILENT)
    yield monitor
    monitor.close()


def beat(address: PulseAddress, rank: int) -> None:
    """A rank's process."""
    pulse = Pulse(address, rank, cut_off_seconds=2.0)
    if rank == 0:
        pulse.note_up()
    time.sleep(60)


@pytest.fixture
def ranks(monitor: PulseMonitor) -> Iterator[list[multiprocessing.process.BaseProcess]]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=beat, args=(monitor.address, rank)) for rank in (0, 1)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    while {peer.rank for peer in list(monitor._peers.values())} != {0, 1}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield list(processes)
    for process in processes:
        process.kill()
        process.join()


def is_quiet(losses: SimpleQueue[Loss], seconds: float) -> bool:
    try:
        losses.get(timeout=seconds)
    except Empty:
        return True
    return False


def test_a_rank_that_dies_is_known_at_once(
    ranks: list[multiprocessing.process.BaseProcess], losses: SimpleQueue[Loss]
) -> None:
    assert is_quiet(losses, 2 * SILENT)
    ranks[1].kill()
    assert losses.get(timeout=PATIENCE) == (1, True)


def test_a_rank_that_is_stopped_is_silent_and_only_the_first_loss_is_told(
    ranks: list[multiprocessing.process.BaseProcess],
    monitor: PulseMonitor,
    losses: SimpleQueue[Loss],
) -> None:
    deadline = time.monotonic() + PATIENCE
    while not [peer for peer in list(monitor._peers.values()) if peer.is_up]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in ranks:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
    started = time.monotonic()
    assert losses.get(timeout=PATIENCE) == (0, False), "more is borne of one that starts"
    assert time.monotonic() - started >= SILENT / 2
    ranks[1].kill()
    assert is_quiet(losses, 1.0)


def test_the_quietest_rank_is_the_stopped_one(
    ranks: list[multiprocessing.process.BaseProcess], monitor: PulseMonitor
) -> None:
    deadline = time.monotonic() + PATIENCE
    while monitor.quietest()[0] is None:  # only rank 0 says that it is up
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert monitor.quietest()[1] < SILENT
    assert ranks[0].pid is not None
    os.kill(ranks[0].pid, signal.SIGSTOP)
    while monitor.quietest()[1] < SILENT / 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert monitor.quietest()[0] == 0
    while monitor._peers.keys() and len(monitor._peers) == 2:  # it is given up
        assert time.monotonic() < deadline + PATIENCE
        time.sleep(0.02)
    assert monitor.quietest() == (0, SILENT)


def test_a_rank_that_is_stopped_while_it_starts_is_lost_too(
    ranks: list[multiprocessing.process.BaseProcess], losses: SimpleQueue[Loss]
) -> None:
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGSTOP)
    started = time.monotonic()
    assert losses.get(timeout=PATIENCE) == (1, False)
    assert time.monotonic() - started >= 1.5 * SILENT


def test_ranks_end_themselves_when_their_controller_is_gone(
    ranks: list[multiprocessing.process.BaseProcess], monitor: PulseMonitor
) -> None:
    for connection in list(monitor._peers):  # as the kernel does when a process ends
        connection.shutdown(socket.SHUT_RDWR)
    for process in ranks:
        process.join(PATIENCE)
        assert process.exitcode == EXIT_STATUS


def test_a_rank_that_hears_nothing_ends_itself() -> None:
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = PulseAddress("127.0.0.1", deaf.getsockname()[1], bytes(16))
        pulse = Pulse(address, 3, cut_off_seconds=2.0, end=ended.set)
        assert ended.wait(PATIENCE)
        pulse.close()


def test_a_meant_end_ends_nobody_else(monitor: PulseMonitor, losses: SimpleQueue[Loss]) -> None:
    ended = threading.Event()
    first = Pulse(monitor.address, 0, end=ended.set)
    second = Pulse(monitor.address, 1, end=ended.set)
    first.close()
    assert is_quiet(losses, 1.0), "it said goodbye"
    monitor.close()
    assert not ended.wait(3 * BEAT_SECONDS), "so did the controller"
    second.close()
    assert not second._thread.is_alive()
    assert not ended.is_set()


def test_a_rank_that_was_let_go_and_that_nobody_ends_ends_itself(monitor: PulseMonitor) -> None:
    ends = {seconds: threading.Event() for seconds in (2.0, math.inf)}
    pulses = [
        Pulse(monitor.address, rank, seconds, end=ended.set)
        for rank, (seconds, ended) in enumerate(ends.items())
    ]
    while len(monitor._peers) < len(pulses):
        time.sleep(0.02)
    monitor.close()
    assert ends[2.0].wait(PATIENCE)
    for pulse in pulses:
        pulse._thread.join(PATIENCE)
        assert not pulse._thread.is_alive()
    assert not ends[math.inf].is_set(), "a controller waits for its driver"


def test_who_does_not_know_the_token_is_nobody(
    monitor: PulseMonitor, losses: SimpleQueue[Loss]
) -> None:
    address = (monitor.address.host, monitor.address.port)
    with socket.create_connection(address) as stranger:
        stranger.sendall(bytes(16) + b"\0\0\0\1" + b"..")
        stranger.settimeout(PATIENCE)
        assert stranger.recv(10) == b""
    assert is_quiet(losses, 0.5)

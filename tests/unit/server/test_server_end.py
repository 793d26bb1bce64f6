"""What of a server's start and end needs no Ray: its port, its signals, what Serve says of it."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from saqqara.cluster.server.ports import PortInUseError, ReservedPort, check_port
from saqqara.cluster.server.stop_signals import StopSignals

LOOPBACK = "127.0.0.1"


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    with StopSignals() as signals:
        yield signals


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def _swallow(function: Callable[[], None]) -> None:
    with suppress(SystemExit):
        function()


def test_a_reserved_port_is_nobody_elses_but_may_be_shared_as_serve_does() -> None:
    with ReservedPort(LOOPBACK, 0) as reserved:
        with pytest.raises(PortInUseError, match=rf"port {reserved.port} of 127.*--port"):
            ReservedPort(LOOPBACK, reserved.port)
        with socket.socket() as proxy:
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            proxy.bind((LOOPBACK, reserved.port))
            proxy.listen()
            for _ in range(20):  # none of them goes to the reservation
                with socket.create_connection((LOOPBACK, reserved.port)):
                    proxy.accept()[0].close()
            with pytest.raises(PortInUseError):
                check_port("0.0.0.0", reserved.port)
    check_port(LOOPBACK, reserved.port)


def test_an_address_that_is_not_here_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"cannot listen on 192\.0\.2\.1:80"):
        check_port("192.0.2.1", 80)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_interrupts_the_start_once(signals: StopSignals, number: int) -> None:
    with pytest.raises(SystemExit), signals.interrupting():
        send(number)
    assert signals.came
    send(number)  # cleaning up goes on


def test_a_signal_that_came_too_early_or_was_caught_is_not_lost(signals: StopSignals) -> None:
    with pytest.raises(SystemExit), signals.interrupting():  # at its end
        _swallow(send)
    with pytest.raises(SystemExit), signals.interrupting():
        pytest.fail("there was a signal before")


def test_a_server_that_runs_waits_for_a_signal(signals: StopSignals) -> None:
    with signals.interrupting():
        pass
    send()
    signals.wait()
    assert signals.came


def test_the_former_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as `ray.init` does
        signals.install()
        send()
        assert signals.came
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

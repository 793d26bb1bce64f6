"""Signs of life between a controller and its ranks: a TCP connection each, beats both ways.

A rank beats from a thread of its own, so its beats go on while it computes, and while it waits in a
collective for a rank that has gone. They end when its process is stopped or its node is cut off;
and when it dies, its connection is closed at once. The controller answers each beat. A rank that
has no answer for long, or whose controller's side was closed, is of no use to anybody and ends its
process: nobody else may be able to. So does one that the controller has let go and that nobody has
ended since, as on a node that is cut off together with its controller. The driver of a controller
listens to it in the same way, but may be stopped for long: the controller ends itself only where
the kernel of the driver's machine does not acknowledge its beats either.

To load libraries can hold up all threads of a process for many seconds, so more silence is borne of
a rank until it says that it is up.

The port is bound to one address and open to whoever knows the token, which is random.
"""

import hmac
import logging
import math
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
SILENT_SECONDS = 5.0  # of a rank, until it counts as unreachable
SILENT_START_SECONDS = 60.0  # the same, of one that is not up yet
CUT_OFF_SECONDS = 15.0  # of the controller, until a rank ends itself; the controller comes first
EXIT_STATUS = 70  # of a rank that ended itself

_TOKEN_BYTES = 16
_RANK = struct.Struct("!I")
_HELLO_BYTES = _TOKEN_BYTES + _RANK.size
_HELLO_SECONDS = 5.0
_BEAT, _UP, _BYE = b".", b"u", b"x"


@dataclass(frozen=True, slots=True)
class PulseAddress:
    """Where a rank beats to."""

    host: str
    port: int
    token: bytes


@dataclass(slots=True, eq=False)
class _Peer:
    """A connection; `rank` is None until it has said who it is."""

    connection: socket.socket
    heard_at: float
    rank: int | None = None
    hello: bytes = b""
    is_up: bool = False


class PulseMonitor:
    """The controller's side: a thread that answers beats and says who has fallen silent.

    Args:
        host: address to listen on.
        on_loss: called once, from the thread, with the first rank that is lost and whether its
            connection was closed (its process has ended) or it is just silent.
        silent_seconds: a rank that is up and not heard for so long is lost.
        silent_start_seconds: the same, of one that is not up yet.
    """

    def __init__(
        self,
        host: str,
        on_loss: Callable[[int, bool], None],
        silent_seconds: float = SILENT_SECONDS,
        silent_start_seconds: float = SILENT_START_SECONDS,
    ) -> None:
        self._on_loss = on_loss
        self._silent_seconds = silent_seconds
        self._silent_start_seconds = silent_start_seconds
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._listener.setblocking(False)
        self.address = PulseAddress(
            host, self._listener.getsockname()[1], secrets.token_bytes(_TOKEN_BYTES)
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[socket.socket, _Peer] = {}
        self._closing = threading.Event()
        self._is_over = False
        self._silent_rank: int | None = None
        self._thread = threading.Thread(target=self._run, name="pulse-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Have the thread say goodbye to all ranks, and end.

        None ends itself at once; somebody is to end them within `CUT_OFF_SECONDS`.

        Does not wait for it, so `on_loss` may call this. Calling it again does nothing.
        """
        self._closing.set()

    def quietest(self) -> tuple[int | None, float]:
        """The rank, of those up, not heard for longest, and the seconds; any thread may ask."""
        if self._silent_rank is not None:  # its connection is closed on our side
            return self._silent_rank, self._silent_seconds
        now = time.monotonic()
        silences = [
            (now - peer.heard_at, peer.rank)
            for peer in list(self._peers.values())
            if peer.rank is not None and peer.is_up
        ]
        seconds, rank = max(silences, default=(0.0, None))
        return rank, seconds

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                before = time.monotonic()
                ready = self._selector.select(BEAT_SECONDS / 2)
                stood_still = time.monotonic() - before - BEAT_SECONDS
                if stood_still > 0:  # it was this process that did, not the ranks
                    for peer in self._peers.values():
                        peer.heard_at += stood_still
                for key, _ in ready:
                    self._serve(key.fileobj)
                self._find_silent()
        finally:
            for connection in list(self._peers):
                _part(connection)
                self._drop(connection)
            self._selector.close()
            self._listener.close()

    def _serve(self, source: object) -> None:
        if source is self._listener:
            with suppress(OSError):
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._peers[connection] = _Peer(connection, time.monotonic())
                self._selector.register(connection, selectors.EVENT_READ)
            return
        assert isinstance(source, socket.socket)
        peer = self._peers[source]
        try:
            data = source.recv(4096)
            if data and peer.rank is None:
                data = self._greet(peer, data)
            if data and _BYE not in data:
                source.send(_BEAT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if _BYE in data:
            self._drop(source)
        elif data:
            peer.heard_at = time.monotonic()
            peer.is_up |= _UP in data
        else:
            self._drop(source)
            if peer.rank is not None:
                self._lose(peer.rank, is_closed=True)

    def _greet(self, peer: _Peer, data: bytes) -> bytes:
        """Take in what a peer says first; empty if it has no business here."""
        peer.hello += data
        if len(peer.hello) < _HELLO_BYTES:
            return _BEAT
        token, rank = peer.hello[:_TOKEN_BYTES], peer.hello[_TOKEN_BYTES:_HELLO_BYTES]
        if not hmac.compare_digest(token, self.address.token):
            return b""
        [peer.rank] = _RANK.unpack(rank)
        return _BEAT + peer.hello[_HELLO_BYTES:]

    def _find_silent(self) -> None:
        now = time.monotonic()
        for peer in list(self._peers.values()):
            borne = self._silent_seconds if peer.is_up else self._silent_start_seconds
            if peer.rank is None:
                if now - peer.heard_at > _HELLO_SECONDS:
                    self._drop(peer.connection)
            elif now - peer.heard_at > borne:
                self._silent_rank = peer.rank
                self._drop(peer.connection)
                self._lose(peer.rank, is_closed=False)

    def _lose(self, rank: int, *, is_closed: bool) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_loss(rank, is_closed)

    def _drop(self, connection: socket.socket) -> None:
        del self._peers[connection]
        self._selector.unregister(connection)
        connection.close()


class Pulse:
    """The rank's side: a thread that beats, and ends the process if nobody answers.

    Args:
        address: the controller's.
        rank: who beats.
        cut_off_seconds: without an answer for so long, or still there so long after the controller
            has let it go, the process ends; `math.inf`: only when the connection is closed, or the
            other machine has been out of reach for `CUT_OFF_SECONDS`.
        end: ends it.

    Raises:
        OSError: the controller cannot be reached.
    """

    def __init__(
        self,
        address: PulseAddress,
        rank: int,
        cut_off_seconds: float = CUT_OFF_SECONDS,
        end: Callable[[], None] = lambda: os._exit(EXIT_STATUS),
    ) -> None:
        self._cut_off_seconds = cut_off_seconds
        self._end = end
        self._connection = socket.create_connection(
            (address.host, address.port), min(cut_off_seconds, CUT_OFF_SECONDS)
        )
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        milliseconds = int(1000 * CUT_OFF_SECONDS)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._connection.sendall(address.token + _RANK.pack(rank))
        self._connection.settimeout(BEAT_SECONDS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def note_up(self) -> None:
        """From now on this process beats as it should."""
        with suppress(OSError):  # the thread sees to it
            self._connection.send(_UP)

    def close(self) -> None:
        """Tell the controller that this end is meant, and stop; again does nothing."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        silent_seconds = 0.0
        is_let_go = False
        while not is_let_go and not self._closing.wait(BEAT_SECONDS):
            try:
                self._connection.send(_BEAT)
                answer = self._connection.recv(4096)
            except TimeoutError:
                # Counted by the waits and not by the clock: this process may have been stopped.
                silent_seconds += 2 * BEAT_SECONDS
                answer = None
            except OSError:
                answer = b""
            if answer:
                silent_seconds = 0.0
                is_let_go = _BYE in answer
            elif answer == b"" or silent_seconds >= self._cut_off_seconds:
                self._end_unless_closing("the controller is out of reach: this rank ends itself")
                break
        _part(self._connection)
        self._connection.close()
        if is_let_go and math.isfinite(self._cut_off_seconds):
            self._closing.wait(self._cut_off_seconds)
            self._end_unless_closing("nobody has ended this rank, which was let go: it does")

    def _end_unless_closing(self, reason: str) -> None:
        if not self._closing.is_set():
            logger.error("%s", reason)
            self._end()


def _part(connection: socket.socket) -> None:
    """Say goodbye so that it arrives: a socket closed with something unread takes it back."""
    with suppress(OSError):
        connection.send(_BYE)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass

"""Where a server listens; its port is reserved before anything that takes long is started."""

import errno
import socket
from dataclasses import dataclass
from typing import Self

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8000


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a server is asked to be; None for host and port: wherever Serve is, or the default.

    Attributes:
        app_name: of the Serve application; on a cluster of others something is put behind it.
    """

    host: str | None = None
    port: int | None = None
    route_prefix: str = "/"
    app_name: str = "saqqara"


class PortInUseError(RuntimeError):
    """Somebody listens on a port already; the message says what to do."""


class ReservedPort:
    """A port that is ours, as long as this is held.

    Ray Serve binds with SO_REUSEPORT, with which a second server on the same port shares its
    requests with the first instead of failing. The reservation is a socket that is bound, but does
    not listen: a bind of Serve's by the same user passes beside it, any other fails.

    Args:
        host: address to bind to.
        port: port to bind to; 0: a free one, see `port`.

    Raises:
        PortInUseError: somebody has the port.
        RuntimeError: there is no such address here, or no right to the port.
    """

    def __init__(self, host: str, port: int) -> None:
        self._socket = _bound(host, port)
        self.port: int = self._socket.getsockname()[1]
        if hasattr(socket, "SO_REUSEPORT"):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        else:
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the port back."""
        self._socket.close()


def check_port(host: str, port: int) -> None:
    """Raise what `ReservedPort` raises if the port cannot be had now; 0 always can."""
    _bound(host, port).close()


def _bound(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen."""
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # Connections of a server that has just ended (TIME_WAIT) are no obstacle with this.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"port {port} of {host} is in use: end what listens there, or choose another "
                f"with --port (0: any that is free)"
            ) from None
        raise RuntimeError(
            f"host, port: cannot listen on {host}:{port}: {error.strerror or error}"
        ) from None
    return server

"""Asks a server, or an engine with a metrics port, what it does now."""

import http.client
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from saqqara.cluster.live.snapshot import LiveStats

KEY_VARIABLE = "SAQQARA_API_KEY"
SERVER_KEYS_VARIABLE = "SAQQARA_API_KEYS"  # the server's own, for whoever is in its shell
_MAX_BYTES = 8 * 2**20  # of an answer: some thousand ranks
_MOST = 2.0**63
_MAX_REASON_CHARS = 200
_PATHS = ("/stats", "/v1", "/metrics")  # what people have at hand; `/stats` stands beside them


class NoAnswerError(RuntimeError):
    """Nobody answers there now; somebody may later."""


class WrongAnswerError(RuntimeError):
    """What answers is no Saqqara, or none that has `/stats`."""


class WrongKeyError(ValueError):
    """The server wants another API key."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine answers; `prefix` stands before `/stats`."""

    scheme: str
    host: str
    port: int | None
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From what people write: `localhost:8000`, `http://host:8000/v1`, `https://host/prefix`.

        Raises:
            ValueError: it is none.
        """
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"URL {text!r:.200}: {error}") from None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise ValueError(f"URL {text!r:.200}: give one such as http://127.0.0.1:8000")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"URL: a key belongs into {KEY_VARIABLE}, not into the address")
        path = parts.path.rstrip("/")
        for known in _PATHS:
            path = path.removesuffix(known)
        return cls(parts.scheme, host, port, path.rstrip("/"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.prefix}"


def key_of(variables: Mapping[str, str]) -> str | None:
    """The API key: `SAQQARA_API_KEY`, or the first of the server's own `SAQQARA_API_KEYS`."""
    keys = variables.get(KEY_VARIABLE) or variables.get(SERVER_KEYS_VARIABLE) or ""
    return keys.partition(",")[0].strip() or None


class Source:
    """One engine, asked again and again.

    Args:
        address: where it answers.
        key: API key; None: none is sent.
        timeout_seconds: that an answer may take.
    """

    def __init__(self, address: Address, key: str | None, timeout_seconds: float = 5.0) -> None:
        self.address = address
        self._key = key
        self._timeout_seconds = timeout_seconds

    @classmethod
    def of(cls, url: str) -> Self:
        """That of an address as people write it, with the key of the environment.

        Raises:
            ValueError: it is no address.
        """
        return cls(Address.parse(url), key_of(os.environ))

    def read(self) -> LiveStats:
        """What the engine does now.

        Raises:
            NoAnswerError: nobody answers, or the engine is being replaced.
            WrongKeyError: the key is wrong or missing.
            WrongAnswerError: it is no engine of ours.
        """
        try:
            status, body = self._get()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise NoAnswerError(f"{self.address} does not answer: {_reason(error)}") from None
        if status in (401, 403):
            wrong = "is wrong" if self._key else "is missing"
            if status == 403:
                wrong = "does not let in, or its name is not one that the server knows"
            raise WrongKeyError(f"{self.address}: the API key {wrong}; set {KEY_VARIABLE}")
        if status in (429, 502, 503, 504):
            raise NoAnswerError(f"{self.address} answers {status}: no engine is there now")
        if status != 200:
            raise WrongAnswerError(f"{self.address}/stats answers {status}; is it a Saqqara?")
        try:
            stats = LiveStats.model_validate_json(body)
            _check_numbers(stats.model_dump())
        except ValueError:
            raise WrongAnswerError(
                f"{self.address}/stats is not what this version reads; is it a Saqqara?"
            ) from None
        return stats

    def _get(self) -> tuple[int, bytes]:
        """Status and body; redirects are not followed, so the key goes nowhere else."""
        address = self.address
        connection: http.client.HTTPConnection
        if address.scheme == "https":
            connection = http.client.HTTPSConnection(
                address.host,
                address.port,
                timeout=self._timeout_seconds,
                context=ssl.create_default_context(),
            )
        else:
            connection = http.client.HTTPConnection(
                address.host, address.port, timeout=self._timeout_seconds
            )
        headers = {"Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request("GET", f"{address.prefix}/stats", headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(_MAX_BYTES)
        finally:
            connection.close()


def _check_numbers(value: Any) -> None:
    """Raise a ValueError for what no engine counts: it would be drawn as bars without end."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item)
    elif isinstance(value, int | float) and not 0 <= value < _MOST:
        raise ValueError(f"{value} is out of range")


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it takes too long"
    if isinstance(error, socket.gaierror):
        return "there is no such host"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    said = f"{type(error).__name__}: {error}"  # whatever a server has sent instead of an answer
    return "".join(c if c.isprintable() else "?" for c in said[:_MAX_REASON_CHARS])

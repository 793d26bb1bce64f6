"""By which names a server may be asked.

A page that somebody visits may have the name it came from lead to another machine afterwards (DNS
rebinding). To the browser it is then of one origin with whatever answers there, and the one thing
that tells is the name that was asked for: nobody else's name can become an address or `localhost`.
"""

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

ANY_HOST = "*"
_PATTERN = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.IGNORECASE)


def check_host_pattern(pattern: str) -> str:
    """The pattern in lower case.

    Raises:
        ValueError: it is neither a name, nor `*.` and a name, nor `*`.
    """
    if pattern != ANY_HOST and not _PATTERN.fullmatch(pattern):
        raise ValueError(
            f"{pattern!r} is no name of a host; write it without scheme and port, such as "
            "models.example.com or *.example.com, or '*' for all"
        )
    return pattern.lower().removesuffix(".")


def is_no_name(host: str) -> bool:
    """Whether this is an address or `localhost`, which nobody can have lead elsewhere."""
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def may_ask_as(asked: str | None, allowed: Iterable[str]) -> bool:
    """Whether a request may be answered whose `Host` is `asked`; None: it has none.

    Browsers always send one; who sends none is a program, which may call itself whatever it likes.

    Args:
        asked: a name or an address, perhaps with a port.
        allowed: patterns as `check_host_pattern` gives them.
    """
    if asked is None:
        return True
    try:
        host = (urlsplit(f"//{asked}").hostname or "").removesuffix(".")
    except ValueError:
        return False
    if is_no_name(host):
        return True
    return any(
        pattern in (ANY_HOST, host) or (pattern[:2] == "*." and host.endswith(pattern[1:]))
        for pattern in allowed
    )

"""What somebody may have meant by a name that is not known."""

import difflib
from collections.abc import Iterable

LONGEST = 100  # letters; more is no name, and comparing takes the square of them
SHORT = 4  # letters; one wrong in such a name is a quarter of it
LIKE, LIKE_SHORT = 0.78, 0.66
"""How alike two names must be; less gives hints that are wrong more often than right."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, or None where none is alike.

    Upper and lower case, `-`, `_` and spaces make no difference.
    """
    if len(name) > LONGEST:
        return None
    plain = {_plain(one): one for one in known}
    cutoff = LIKE_SHORT if len(name) <= SHORT else LIKE
    found = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest one, or all."""
    known = sorted(known)
    close = closest(name, known)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")

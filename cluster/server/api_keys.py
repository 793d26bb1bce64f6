"""Who may use a server: API keys, of which only hashes are kept."""

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

KEYS_VARIABLE = "SAQQARA_API_KEYS"
ANYBODY = "anonymous"  # who asks a server without keys
_SCHEME = "bearer "


class ApiKeys:
    """A set of keys. Holds SHA-256 hashes, so neither logs nor dumps of it give a key away.

    Args:
        hashes: SHA-256 of each key; none: everybody is let in.
    """

    def __init__(self, hashes: Iterable[bytes] = ()) -> None:
        self._hashes = tuple(hashes)

    @classmethod
    def load(cls, file: str | None = None, environ: Mapping[str, str] = os.environ) -> Self:
        """Keys of a file (one per line, `#` starts a comment line) and of `SAQQARA_API_KEYS`.

        Raises:
            ValueError: the file cannot be read or has no key.
        """
        keys = [key.strip() for key in environ.get(KEYS_VARIABLE, "").split(",")]
        if KEYS_VARIABLE in environ and not any(keys):
            raise ValueError(f"{KEYS_VARIABLE} is set and holds no key; unset it to have none")
        if file is not None:
            keys += _read(file)
        return cls(_hash(key) for key in keys if key)

    def __len__(self) -> int:
        return len(self._hashes)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self)})"

    def accepts(self, authorization: str | None) -> bool:
        """Whether the value of an `Authorization` header holds one of the keys.

        Takes the same time whichever key it is and however much of it is right.
        """
        if not self._hashes:
            return True
        given = _given_hash(authorization)
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        return any(matches)

    def owner(self, authorization: str | None) -> str:
        """Who asks: an id of the key that a header which `accepts` takes holds.

        It is the same in every replica and after a restart, and tells nothing of the key. Without
        keys everybody is `ANYBODY`.
        """
        if not self._hashes:
            return ANYBODY
        assert self.accepts(authorization), "who has no key here owns nothing"
        digest = hashlib.blake2b(_given_hash(authorization), digest_size=16, person=b"owner")
        return digest.hexdigest()


def _given_hash(authorization: str | None) -> bytes:
    """Of the key in a header; empty, which no key's is, where there is none."""
    if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
        return b""
    return _hash(authorization[len(_SCHEME) :].strip())


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(file: str) -> list[str]:
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"api_key_file: {file} cannot be read ({error.strerror})") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api_key_file: {file} holds no key; write one per line")
    return keys

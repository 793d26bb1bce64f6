"""The bytes that single tokens stand for, read from the tokenizer's vocabulary.

A decoder gives U+FFFD for a token that is a part of a character; the vocabulary still says which
bytes it has. Two kinds spell bytes: byte-level BPE writes each byte as a printable character (a
space is `Ġ`), and byte fallback has a token `<0xE6>` for each. Any other token is its text.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Looks up the bytes of a Hugging Face tokenizer's tokens.

    Args:
        backend: the tokenizer.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        decoders = list(_decoders(backend))
        kinds = {decoder["type"] for decoder in decoders}
        self._is_byte_level = "ByteLevel" in kinds
        self._has_fallback = "ByteFallback" in kinds
        self._replacements = dict(filter(None, map(_replacement, decoders)))
        self._strips_start = any(map(_strips_start, decoders))
        self._known: dict[int, bytes] = {}

    def __call__(self, token_id: int, *, at_start: bool = False) -> bytes:
        """The bytes that a token adds to a text, at its start or further on; none if unknown."""
        data = self._known.get(token_id)
        if data is None:
            data = self._known[token_id] = self._read(token_id)
        if at_start and self._strips_start:
            return data.removeprefix(b" ")
        return data

    def _read(self, token_id: int) -> bytes:
        convert = getattr(self._backend, "convert_ids_to_tokens", None)
        spelled = convert(token_id) if convert is not None else None
        if spelled is None:
            text: str = self._backend.decode(
                [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            return text.encode()
        if self._is_byte_level:
            return _from_alphabet(spelled)
        if self._has_fallback and (byte := _FALLBACK.fullmatch(spelled)):
            return bytes.fromhex(byte[1])
        for old, new in self._replacements.items():
            spelled = spelled.replace(old, new)
        return str(spelled).encode()


def _decoders(backend: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of a tokenizer's decoders, one by one; none where it has no Rust side."""
    rust = getattr(backend, "backend_tokenizer", None)
    if rust is None or rust.decoder is None:
        return
    waiting = [json.loads(rust.decoder.__getstate__())]
    while waiting:
        decoder = waiting.pop(0)
        waiting[:0] = decoder.get("decoders", ())
        yield decoder


def _replacement(decoder: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a decoder writes for what stands in the vocabulary."""
    if decoder["type"] == "Metaspace":
        return decoder["replacement"], " "
    if decoder["type"] == "Replace" and "String" in decoder["pattern"]:
        return decoder["pattern"]["String"], decoder["content"]
    return None


def _strips_start(decoder: Mapping[str, Any]) -> bool:
    """Whether a text loses the space that it begins with."""
    if decoder["type"] == "Metaspace":
        return bool(decoder.get("prepend_scheme") != "never")
    return bool(decoder["type"] == "Strip" and decoder["content"] == " " and decoder["start"])


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte: itself where it prints, else the next from 256."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_ALPHABET = _byte_alphabet()


def _from_alphabet(spelled: str) -> bytes:
    """The bytes of a byte-level token; added tokens may have characters of their own."""
    try:
        return bytes(_ALPHABET[char] for char in spelled)
    except KeyError:
        return spelled.encode()

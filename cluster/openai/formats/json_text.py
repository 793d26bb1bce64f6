"""One JSON value, read as its text comes, in pieces of any size.

Standard parsers want the whole text, and calls of tools are shown while they are written.
"""

import re
from typing import Literal

State = Literal["open", "done", "broken"]

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SPACE = " \t\r\n"
_WORDS = {"t": "true", "f": "false", "n": "null"}
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = frozenset('"\\/bfnrt')
_CONTROL = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
# A number, character by character: state -> (characters -> state). Those of `_NUMBER_ENDS` may end.
_DIGITS = "0123456789"
_NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "zero", **dict.fromkeys("123456789", "int")},
    "zero": {".": "dot", "e": "e", "E": "e"},
    "int": {**dict.fromkeys(_DIGITS, "int"), ".": "dot", "e": "e", "E": "e"},
    "dot": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {**dict.fromkeys(_DIGITS, "fraction"), "e": "e", "E": "e"},
    "e": {"+": "sign", "-": "sign", **dict.fromkeys(_DIGITS, "exponent")},
    "sign": dict.fromkeys(_DIGITS, "exponent"),
    "exponent": dict.fromkeys(_DIGITS, "exponent"),
}
_NUMBER_STARTS = {"-": "minus", "0": "zero", **dict.fromkeys("123456789", "int")}
_NUMBER_ENDS = frozenset({"zero", "int", "fraction", "exponent"})


class JsonText:
    """Reads one value: `feed` takes what belongs to it, `take` gives it back as JSON.

    Whether, and where, a text is broken does not depend on how it is cut. One thing is mended:
    models write line breaks into strings, which JSON wants escaped.

    Attributes:
        state: `done` with the value's last character (of a number: with the one after it, which is
            not taken); `broken` before the first character that cannot stand there.
    """

    def __init__(self) -> None:
        self.state: State = "open"
        self._open: list[str] = []  # the brackets that are open
        self._next = "value"  # what may come: see `_step`
        self._is_key = False
        self._word = ""  # of a literal, what is still to come
        self._number = ""
        self._num_hex = 0
        self._out: list[str] = []

    def feed(self, text: str, at: int = 0) -> int:
        """Take characters from `text[at:]`; returns the place of the first that is not taken."""
        end = len(text)
        while at < end and self.state == "open":
            if self._next == "string" and (plain := _PLAIN.match(text, at)):
                self._out.append(plain[0])
                at = plain.end()
            elif self._step(text[at]):
                at += 1
        return at

    def take(self) -> str:
        """The value's text since the last time."""
        text = "".join(self._out)
        self._out.clear()
        return text

    def end(self) -> None:
        """No more will come: a number is done with that, anything else that is open is broken."""
        if self.state == "open":
            is_number = self._next == "number" and self._number in _NUMBER_ENDS and not self._open
            self.state = "done" if is_number else "broken"

    def _step(self, char: str) -> bool:
        """Take one character; False if it was not taken (the value has ended, or is broken)."""
        kind = self._next
        if kind == "string":
            return self._in_string(char)
        if kind == "escape":
            return self._in_escape(char)
        if kind == "number":
            return self._in_number(char)
        if kind == "word":
            return self._in_word(char)
        if char in _SPACE and (self._open or kind != "value"):
            self._out.append(char)
            return True
        if kind in ("value", "item or end"):
            return self._begin_value(char, may_end=kind == "item or end")
        if kind in ("key", "key or end"):
            return self._begin_key(char, may_end=kind == "key or end")
        if kind == "colon":
            return self._put(char, "value") if char == ":" else self._break()
        assert kind == "comma or end", kind
        if char == ",":
            return self._put(char, "key" if self._open[-1] == "{" else "value")
        return self._close(char)

    def _begin_value(self, char: str, *, may_end: bool) -> bool:
        if char == "{":
            self._open.append(char)
            return self._put(char, "key or end")
        if char == "[":
            self._open.append(char)
            return self._put(char, "item or end")
        if char == '"':
            self._is_key = False
            return self._put(char, "string")
        if char in _WORDS:
            self._word = _WORDS[char][1:]
            return self._put(char, "word")
        if char in _NUMBER_STARTS:
            self._number = _NUMBER_STARTS[char]
            return self._put(char, "number")
        return self._close(char) if may_end else self._break()

    def _begin_key(self, char: str, *, may_end: bool) -> bool:
        if char == '"':
            self._is_key = True
            return self._put(char, "string")
        return self._close(char) if may_end else self._break()

    def _close(self, char: str) -> bool:
        if char != {"{": "}", "[": "]"}[self._open[-1]]:
            return self._break()
        self._open.pop()
        self._out.append(char)
        return self._value_ended()

    def _in_string(self, char: str) -> bool:
        if char == '"':
            self._out.append(char)
            if self._is_key:
                self._is_key, self._next = False, "colon"
                return True
            return self._value_ended()
        if char == "\\":
            return self._put(char, "escape")
        self._out.append(_CONTROL.get(char, f"\\u{ord(char):04x}"))
        return True

    def _in_escape(self, char: str) -> bool:
        if self._num_hex:
            self._num_hex -= 1
            if char not in _HEX:
                return self._break()
        elif char == "u":
            self._num_hex = 4
        elif char not in _ESCAPES:
            return self._break()
        return self._put(char, "escape" if self._num_hex else "string")

    def _in_word(self, char: str) -> bool:
        if char != self._word[0]:
            return self._break()
        self._word = self._word[1:]
        self._out.append(char)
        return True if self._word else self._value_ended()

    def _in_number(self, char: str) -> bool:
        following = _NUMBER[self._number].get(char)
        if following is not None:
            self._number = following
            return self._put(char, "number")
        if self._number not in _NUMBER_ENDS:
            return self._break()
        self._value_ended()
        return False

    def _value_ended(self) -> bool:
        if self._open:
            self._next = "comma or end"
        else:
            self.state = "done"
        return True

    def _put(self, char: str, following: str) -> bool:
        self._out.append(char)
        self._next = following
        return True

    def _break(self) -> bool:
        self.state = "broken"
        return False

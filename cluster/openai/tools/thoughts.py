"""Thoughts and what follows them: `<think>...</think>`."""

from saqqara.cluster.openai.formats.call_parser import Markers
from saqqara.cluster.openai.formats.deltas import SPACE

BEGIN = "<think>"
END = "</think>"
_END = Markers(END)


class ThoughtSplitter:
    """Divides a text into thoughts and the rest, in pieces of any size.

    A text has thoughts if it begins with the opening marker, or if that stands at the end of the
    prompt. Without a closing marker all of it is thoughts. Space around the markers is none of
    either's.

    Args:
        is_open: the text begins within the thoughts.
    """

    def __init__(self, *, is_open: bool) -> None:
        self._is_open = is_open
        self._state = "begin"
        self._text = ""
        self._space: list[str] = []  # held back
        self._has_thought = False

    def feed(self, text: str, *, is_end: bool = False) -> tuple[str, str]:
        """Take the next piece; returns what is certain now: (thoughts, rest)."""
        self._text += text
        thoughts: list[str] = []
        rest: list[str] = []
        if self._state == "begin":
            self._begin(rest, is_end=is_end)
        if self._state == "thoughts":
            self._think(thoughts, is_end=is_end)
        if self._state == "after":
            self._text = self._text.lstrip(SPACE)
            self._state = "rest" if self._text else "after"
        if self._state == "rest":
            rest.append(self._text)
            self._text = ""
        return "".join(thoughts), "".join(rest)

    def _begin(self, rest: list[str], *, is_end: bool) -> None:
        """Space and a marker that may come, before anything else."""
        body = self._text.lstrip(SPACE)
        self._space.append(self._text[: len(self._text) - len(body)])
        self._text = body
        if BEGIN.startswith(body) and body != BEGIN and not is_end:
            return
        if body.startswith(BEGIN):
            self._text = body[len(BEGIN) :]
        elif not self._is_open:
            self._state = "rest"
            rest += self._space
            return
        self._state = "thoughts"
        self._space.clear()

    def _think(self, thoughts: list[str], *, is_end: bool) -> None:
        found = _END.search(self._text, 0)
        if found is not None:
            place = found[0]
        else:
            place = len(self._text) if is_end else _END.begins(self._text, 0)
        self._add(thoughts, self._text[:place])
        self._text = self._text[place:]
        if found is not None:
            self._text = self._text[len(END) :]
            self._state = "after"

    def _add(self, thoughts: list[str], text: str) -> None:
        """Thoughts without the space at their beginning and end."""
        body = text.rstrip(SPACE)
        if not body:
            self._space.append(text)
            return
        if self._has_thought:
            thoughts += [*self._space, body]
        else:
            self._has_thought = True
            thoughts.append(body.lstrip(SPACE))
        self._space = [text[len(body) :]]

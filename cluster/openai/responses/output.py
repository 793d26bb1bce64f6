"""The items that an answer is made of, grown piece by piece, and the events that tell of it.

An answer that is not streamed goes the same way in one piece, so that both have the same items.
"""

import secrets
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]


class Output:
    """The output of one response.

    An item ends where one of another kind, or another call, begins. Events have no numbers yet.
    """

    def __init__(self) -> None:
        self._items: list[_Item] = []

    @property
    def items(self) -> list[Json]:
        """What there is so far."""
        return [item.json for item in self._items]

    @property
    def reasoning(self) -> str:
        """All thoughts."""
        return "".join(item.text for item in self._items if item.kind == "reasoning")

    def add_text(self, text: str, logprobs: Sequence[Json] = ()) -> list[Json]:
        """More of the message, with the log-probabilities of its tokens."""
        return self._add("message", text, logprobs)

    def add_reasoning(self, text: str) -> list[Json]:
        """More thoughts."""
        return self._add("reasoning", text)

    def begin_call(self, call_id: str, name: str) -> list[Json]:
        """A call begins; its arguments follow."""
        return [*self._close("completed"), *self._open(_Call(len(self._items), call_id, name))]

    def add_arguments(self, text: str) -> list[Json]:
        """More of the arguments of the latest call."""
        assert self._items[-1].kind == "function_call", "arguments are of a call"
        return self._items[-1].add(text, ()) if text else []

    def end(self, *, is_cut: bool) -> list[Json]:
        """Nothing more comes; an answer without anything is an empty message.

        Args:
            is_cut: the answer was not at its end.
        """
        begun = [] if self._items else self._add("message", "")
        return begun + self._close("incomplete" if is_cut else "completed")

    def _add(self, kind: str, text: str, logprobs: Sequence[Json] = ()) -> list[Json]:
        events: list[Json] = []
        if not self._items or self._items[-1].kind != kind:
            events += self._close("completed")
            made = _Message if kind == "message" else _Reasoning
            events += self._open(made(len(self._items)))
        if not text and not logprobs:
            return events
        return events + self._items[-1].add(text, logprobs)

    def _open(self, item: "_Item") -> list[Json]:
        self._items.append(item)
        return item.begin()

    def _close(self, status: str) -> list[Json]:
        return self._items[-1].end(status) if self._items else []


class _Item:
    """An item that is being written.

    Args:
        index: its place in the output.
    """

    kind = ""
    prefix = ""

    def __init__(self, index: int) -> None:
        self._place = {"item_id": f"{self.prefix}_{secrets.token_hex(16)}", "output_index": index}
        self._status = "in_progress"
        self._text: list[str] = []

    @property
    def json(self) -> Json:
        """The item as it is."""
        head = {"id": self._place["item_id"], "type": self.kind, "status": self._status}
        return {**head, **self._fields()}

    @property
    def text(self) -> str:
        """What was written."""
        return "".join(self._text)

    def begin(self) -> list[Json]:
        """The events of its beginning."""
        return [self._item_event("added")]

    def add(self, text: str, logprobs: Sequence[Json]) -> list[Json]:
        """The events of a piece."""
        raise NotImplementedError

    def end(self, status: str) -> list[Json]:
        """The events of its end."""
        self._status = status
        return [self._item_event("done")]

    def _fields(self) -> Json:
        raise NotImplementedError

    def _item_event(self, what: str) -> Json:
        event = {"type": f"response.output_item.{what}"}
        return {**event, "output_index": self._place["output_index"], "item": self.json}


class _WithPart(_Item):
    """An item with one part of content."""

    event = ""

    def begin(self) -> list[Json]:
        """See `_Item`."""
        return [
            {**self._item_event("added"), "item": {**self.json, "content": []}},
            self._part_event("response.content_part.added", part=self._part()),
        ]

    def end(self, status: str) -> list[Json]:
        """See `_Item`."""
        return [
            self._part_event(f"{self.event}.done", text=self.text, **self._with_text()),
            self._part_event("response.content_part.done", part=self._part()),
            *super().end(status),
        ]

    def _part(self) -> Json:
        raise NotImplementedError

    def _with_text(self) -> Json:
        return {}

    def _part_event(self, name: str, **fields: Any) -> Json:
        return {"type": name, **self._place, "content_index": 0, **fields}


class _Message(_WithPart):
    kind = "message"
    prefix = "msg"
    event = "response.output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._logprobs: list[Json] = []

    def add(self, text: str, logprobs: Sequence[Json]) -> list[Json]:
        """See `_Item`."""
        self._text.append(text)
        self._logprobs += logprobs
        return [self._part_event(f"{self.event}.delta", delta=text, logprobs=list(logprobs))]

    def _fields(self) -> Json:
        return {"role": "assistant", "content": [self._part()]}

    def _part(self) -> Json:
        part = {"type": "output_text", "text": self.text, "annotations": []}
        return {**part, **self._with_text()}

    def _with_text(self) -> Json:
        return {"logprobs": list(self._logprobs)}


class _Reasoning(_WithPart):
    kind = "reasoning"
    prefix = "rs"
    event = "response.reasoning_text"

    def add(self, text: str, logprobs: Sequence[Json]) -> list[Json]:
        """See `_Item`."""
        self._text.append(text)
        return [self._part_event(f"{self.event}.delta", delta=text)]

    def _fields(self) -> Json:
        return {"summary": [], "content": [self._part()]}

    def _part(self) -> Json:
        return {"type": "reasoning_text", "text": self.text}


class _Call(_Item):
    """A call of a function.

    Args:
        index: its place in the output.
        call_id: what its output is sent back with.
        name: of the function.
    """

    kind = "function_call"
    prefix = "fc"
    _EVENT = "response.function_call_arguments"

    def __init__(self, index: int, call_id: str, name: str) -> None:
        super().__init__(index)
        self._call = {"call_id": call_id, "name": name}

    def add(self, text: str, logprobs: Sequence[Json]) -> list[Json]:
        """See `_Item`."""
        self._text.append(text)
        return [{"type": f"{self._EVENT}.delta", **self._place, "delta": text}]

    def end(self, status: str) -> list[Json]:
        """See `_Item`."""
        done = {"name": self._call["name"], "arguments": self.text}
        return [{"type": f"{self._EVENT}.done", **self._place, **done}, *super().end(status)]

    def _fields(self) -> Json:
        return {**self._call, "arguments": self.text}

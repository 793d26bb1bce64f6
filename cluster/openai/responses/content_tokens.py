"""Log-probabilities of the tokens that are a message's text, of all that an answer has."""

import codecs
from collections.abc import Sequence
from typing import Any

from saqqara.cluster.openai.logprobs import Entry, chat_logprobs

Json = dict[str, Any]


class ContentTokens:
    """Takes the tokens of an answer, and gives those of its content.

    Tokens of thoughts, of calls and of what is around them have no place in a response.

    Args:
        count: of the best tokens that are shown.

    Attributes:
        num_chars: of the text of the tokens so far, without what a stop string cuts off.
    """

    def __init__(self, count: int) -> None:
        self.num_chars = 0
        self._count = count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: list[tuple[int, Entry]] = []  # with the characters that each adds

    def take(self, entry: Entry) -> None:
        """The next token."""
        token = next(iter(entry.values()))
        num_chars = len(self._decoder.decode(token.token_bytes))
        self.num_chars += num_chars
        self._waiting.append((num_chars, entry))

    def take_all(self, entries: Sequence[Entry]) -> None:
        """The next tokens, of an answer that is nothing but content."""
        self._waiting += [(0, entry) for entry in entries]

    def give(self, num_chars: int) -> list[Json]:
        """Of the latest tokens those that so many characters are of; the others are left out."""
        first = len(self._waiting)
        while num_chars > 0 and first > 0:
            first -= 1
            num_chars -= self._waiting[first][0]
        entries = [entry for _, entry in self._waiting[first:]]
        self._waiting.clear()
        return self._shown(entries)

    def give_all(self) -> list[Json]:
        """All tokens since the last time."""
        entries = [entry for _, entry in self._waiting]
        self._waiting.clear()
        return self._shown(entries)

    def _shown(self, entries: Sequence[Entry]) -> list[Json]:
        shown: list[Json] = chat_logprobs(entries, self._count, show_token_ids=False)["content"]
        return shown

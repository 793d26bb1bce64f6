"""How an answer can still be completed when its tokens run out.

A grammar tells which token may come next, not how far its end is. So an ending is looked for by
trial: in a copy of the matcher, brackets and quotes are closed wherever that is allowed, and what
has to come before is written as shortly as a few attempts find.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS = 96  # of an ending; so many before the last token an answer is looked at
_MAX_ATTEMPTS = 6
_MAX_WORK = 1600  # of one search: some 30 ms
_STATE_WORK, _GUESS_WORK = 4, 1  # what a mask costs, and a guess whether some tokens match
_STRAYING = 0.3  # how often a later attempt takes any token

_BRACKETS = ("}]}", "]}]", "}}}", "]]]", "}}", "]}", "}]", "]]", "}", "]")
_QUOTES_OF_TEXT = ('"}]}', '"}}', '"}]', '"]}', '"}', '"]', '":', '"')
_QUOTES = ('""', '"')
_SEPARATORS = (":", ",")
_FILLERS = ("aaaaaaaa", "aaaa", "aa", "a")
# By their kinds; a backslash would make a letter of the quote after it.
_PRINTED = [chr(code) for code in range(33, 127) if chr(code) != "\\"]
_CHARACTERS = (
    [c for c in _PRINTED if c.isdigit()],
    [c for c in _PRINTED if c.islower()],
    [c for c in _PRINTED if c.isupper()],
    [c for c in _PRINTED if not c.isalnum()],
)


class Endings:
    """Finds endings for the tokens of one table. The same state of a matcher has the same one.

    Args:
        table: the tokens, an `llguidance.LLTokenizer`.
    """

    def __init__(self, table: Any) -> None:
        self.end_of_text: int = table.eos_token
        self.num_words = -(-table.vocab_size // 32)
        self.brackets = _ids(table, _BRACKETS)
        self.quotes_of_text = _ids(table, _QUOTES_OF_TEXT)
        self.quotes = _ids(table, _QUOTES)
        self.separators = _ids(table, _SEPARATORS)
        self.fillers = _ids(table, _FILLERS)
        self.characters = tuple(_ids(table, kind) for kind in _CHARACTERS)

    def is_ending(self, matcher: Any, token_ids: Sequence[int]) -> bool:
        """Whether the answer is complete after these tokens, one at least."""
        whole = [*token_ids, self.end_of_text]
        return bool(matcher.validate_tokens(whole) == len(whole))

    def find(self, matcher: Any, most: int) -> tuple[int, ...] | None:
        """Tokens, at most so many, after which the answer is complete; None: none were found."""
        search = _Search(self, most)
        for attempt in range(_MAX_ATTEMPTS):
            if (found := search.attempt(matcher.deep_copy(), attempt)) is not None:
                return tuple(found)
        return None


class Countdown:
    """The tokens that an answer has left, and how it is completed within them.

    Nothing is changed while an ending fits. Where a token would leave none that does, the answer
    takes the ending that fitted before.

    Args:
        endings: for the tokens of the answer's model.
        num_left: tokens that may still be written.
    """

    def __init__(self, endings: Endings, num_left: int) -> None:
        self._endings = endings
        self._num_left = num_left
        self._looks_from = MAX_TOKENS
        self._ending: tuple[int, ...] | None = None
        self._next: tuple[int, tuple[int, ...] | None] | None = None

    def choose(self, matcher: Any, sampled: int) -> int:
        """The next token: the sampled one, unless the answer could not be completed after it."""
        self._next = None
        if self._num_left > self._looks_from:
            return sampled
        token_id, ending = sampled, self._ending_after(matcher, sampled)
        if ending is None:
            now = self._ending
            if now is None:
                now = self._endings.find(matcher, self._num_left)
            if now is None:  # a search that fails is a long one
                self._looks_from = self._num_left // 2
            else:
                token_id, *rest = now or (self._endings.end_of_text,)
                ending = tuple(rest)
        self._next = token_id, ending
        return token_id

    def pass_by(self, token_id: int) -> None:
        """Note a token that was taken."""
        self._num_left -= 1
        is_next = self._next is not None and self._next[0] == token_id
        self._ending = self._next[1] if is_next and self._next is not None else None

    def _ending_after(self, matcher: Any, token_id: int) -> tuple[int, ...] | None:
        most = self._num_left - 1
        for known in self._known(token_id):
            if len(known) <= most and self._endings.is_ending(matcher, (token_id, *known)):
                return known
        after = matcher.deep_copy()
        return self._endings.find(after, most) if after.consume_token(token_id) else None

    def _known(self, token_id: int) -> Iterator[tuple[int, ...]]:
        """Endings that may still be right after a token."""
        if self._ending:
            if self._ending[0] == token_id:
                yield self._ending[1:]
            yield self._ending  # text that goes on ends as it would have


class _Search:
    """Attempts at one ending, of so many tokens at most."""

    def __init__(self, endings: Endings, most: int) -> None:
        self._endings = endings
        self._most = most
        self._work = _MAX_WORK
        self._rng = Random(0)
        self._num_open = 0  # tokens since something was closed

    def attempt(self, matcher: Any, number: int) -> list[int] | None:
        """Go on until the answer is complete; the attempts after the first stray from the way."""
        path: list[int] = []
        while not matcher.is_accepting():
            if len(path) >= self._most or self._work <= 0 or matcher.is_error():
                return None
            straying = _STRAYING if number else 0.0
            more = matcher.compute_ff_tokens() or [self._choose(matcher, straying)]
            if not matcher.consume_tokens(more):
                return None
            path += more
        return path if len(path) <= self._most else None

    def _choose(self, matcher: Any, straying: float) -> int:
        """The next token: one that closes something if there is one."""
        from llguidance.numpy import fill_next_token_bitmask

        self._work -= _STATE_WORK
        words = np.zeros((1, self._endings.num_words), dtype=np.int32)
        fill_next_token_bitmask(matcher, words, 0)
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")
        found = None if self._rng.random() < straying else self._closing(matcher, allowed)
        return self._any(allowed) if found is None else found

    def _closing(self, matcher: Any, allowed: NDArray[np.uint8]) -> int | None:
        """A token that closes something, or after which one can. In text no bracket does."""
        known = self._endings
        is_text = any(allowed[t] for t in known.fillers) and any(allowed[t] for t in known.brackets)
        if is_text:
            closers: tuple[int, ...] = known.quotes_of_text
            tails = [closers[-1:], known.fillers[-1:] + closers[-1:]]
        else:
            closers = known.brackets + known.quotes + known.separators
            last = known.separators[-1:] + known.brackets[-2:] + known.quotes[-1:]
            tails = [(token_id,) for token_id in last]
            tails.append(known.fillers[-1:] + known.quotes[-1:])  # `@` in an address
        found = next((token_id for token_id in closers if allowed[token_id]), None)
        self._num_open += 1
        if found is None and self._num_open & (self._num_open - 1) == 0:  # ever more rarely
            found = self._before_closing(matcher, allowed, tails)
        if found is not None:
            self._num_open = 0
            return found
        return next((token_id for token_id in known.fillers if is_text and allowed[token_id]), None)

    def _before_closing(
        self, matcher: Any, allowed: NDArray[np.uint8], tails: Sequence[tuple[int, ...]]
    ) -> int | None:
        """A character after which one of the tails may stand."""
        characters = [t for kind in self._endings.characters for t in kind if allowed[t]]
        for tail in tails:
            for token_id in characters:
                self._work -= _GUESS_WORK
                if matcher.validate_tokens([token_id, *tail]) == 1 + len(tail):
                    return token_id
        return None

    def _any(self, allowed: NDArray[np.uint8]) -> int:
        """A character of any kind, so that one which has to come does; else any token."""
        kinds = [[t for t in kind if allowed[t]] for kind in self._endings.characters]
        kinds = [kind for kind in kinds if kind] or [np.flatnonzero(allowed).tolist()]
        return self._rng.choice(self._rng.choice(kinds) or [self._endings.end_of_text])


def _ids(table: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """The tokens that stand for exactly these texts, of those that there are."""
    split = [table.greedy_tokenize(text) for text in texts]
    return tuple(token_ids[0] for token_ids in split if len(token_ids) == 1)

"""Grammars made ready for one model's tokens, a few of them kept.

A grammar takes milliseconds to seconds to compile, a copy of a compiled one microseconds. So they
are compiled before a step needs them, in another thread than that of the steps.
"""

import threading
from collections import OrderedDict
from functools import cache
from typing import Any

from saqqara.workers.models.source import described_folder
from saqqara.workers.plan import Grammar

from .endings import Endings

MAX_GRAMMARS = 1024  # as many as the requests of a full queue may have
MAX_GRAMMAR_BYTES = 2 << 20  # of the texts of those that are kept; compiled, some 200 times that
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 250_000,
    "verbose_errors": False,
}
"""Of `llguidance.LLParserLimits`."""

Key = tuple[str, tuple[int, ...]]


class Compiler:
    """Compiles grammars for the tokens of one model. Its methods may be called from any thread.

    The table of tokens is made for the first grammar: that takes seconds, and most models are used
    without.

    Args:
        tokenizer: folder or hub id of the model's tokenizer.
        vocab_size: tokens that the model can write; the tokenizer may have fewer.
    """

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tables: dict[tuple[int, ...], Any] = {}
        self._endings: dict[tuple[int, ...], Endings] = {}
        self._compiled: OrderedDict[Key, Any] = OrderedDict()
        self._num_bytes = 0
        self._making = threading.Lock()  # one table, one grammar at a time
        self._changing = threading.Lock()

    def compile(self, grammar: Grammar) -> None:
        """Have a grammar ready.

        Raises:
            ValueError: it cannot be compiled, or there is no table for this tokenizer.
        """
        self.matcher(grammar)

    def matcher(self, grammar: Grammar) -> Any:
        """A matcher (`llguidance.LLMatcher`) that nothing has gone into yet.

        Raises:
            ValueError: see `compile`.
        """
        key = (grammar.text, grammar.eos_token_ids)
        found = self._find(key)
        if found is None:
            with self._making:
                found = self._find(key) or self._make(key)
        return found.deep_copy()

    def endings(self, eos_token_ids: tuple[int, ...]) -> Endings:
        """What finds endings of answers in this model's tokens."""
        table = self._table(eos_token_ids)
        if eos_token_ids not in self._endings:
            self._endings[eos_token_ids] = Endings(table)
        return self._endings[eos_token_ids]

    def num_words(self, eos_token_ids: tuple[int, ...]) -> int:
        """32-bit words of a mask."""
        vocab_size: int = self._table(eos_token_ids).vocab_size
        return -(-vocab_size // 32)

    def _find(self, key: Key) -> Any:
        with self._changing:
            if key in self._compiled:
                self._compiled.move_to_end(key)
            return self._compiled.get(key)

    def _make(self, key: Key) -> Any:
        from llguidance import LLMatcher

        text, eos_token_ids = key
        made = LLMatcher(self._table(eos_token_ids), text, log_level=0, limits=parser_limits())
        if not made.is_error():
            made.compute_bitmask()  # the first mask may cost most, which no step should wait for
        if made.is_error():
            raise ValueError(first_line(made.get_error()))
        with self._changing:
            self._compiled[key] = made
            self._num_bytes += len(text)
            while len(self._compiled) > MAX_GRAMMARS or self._num_bytes > MAX_GRAMMAR_BYTES:
                (dropped, _), _ = self._compiled.popitem(last=False)
                self._num_bytes -= len(dropped)
        return made

    def _table(self, eos_token_ids: tuple[int, ...]) -> Any:
        if eos_token_ids not in self._tables:
            self._tables[eos_token_ids] = token_table(
                self._tokenizer, self._vocab_size, eos_token_ids
            )
        return self._tables[eos_token_ids]


def token_table(tokenizer: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Any:
    """The bytes of every token, as `llguidance.LLTokenizer`.

    Tokens that the tokenizer lacks, such as those that pad a model's vocabulary, and special ones
    stand for no text, so no grammar allows them.

    Raises:
        ValueError: the tokenizer does not tell what its tokens stand for.
    """
    from llguidance import hf
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(str(described_folder(tokenizer, "tokenizer")))
        return hf.from_tokenizer(
            backend, n_vocab=max(vocab_size, len(backend)), eos_token=list(eos_token_ids)
        )
    except Exception as error:  # the libraries raise bare Exceptions
        raise ValueError(
            f"structured_outputs: this model's tokenizer has no table of tokens: {error}"
        ) from error


@cache
def parser_limits() -> Any:
    """What one grammar may cost (`llguidance.LLParserLimits`).

    Compiling the largest takes about a second, a step with it some 50 ms, its states 100 MB.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(**LIMITS)


def first_line(message: str) -> str:
    """What went wrong, without the state of the parser that follows it.

    Of a wrong regular expression the first line says only that it is wrong, a later one why.
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    whys = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join([*lines[:1], *whys]) or "unknown error"

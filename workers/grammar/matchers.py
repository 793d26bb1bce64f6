"""Where the answers of the sequences in slots stand in their grammars."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saqqara.workers.cgroups import usable_cores
from saqqara.workers.plan import Grammar

from .compiler import Compiler, first_line
from .endings import MAX_TOKENS, Countdown
from .masks import TokenMasks

_MAX_THREADS = 8


@dataclass(slots=True, eq=False)
class _Held:
    matcher: Any
    grammar: Grammar
    countdown: Countdown | None = None


class Matchers:
    """The matchers of one rank, the one that samples, by slot.

    A matcher goes on by each token that is sampled and is made anew, from the tokens known by then,
    where a sequence is resumed: so it always stands where the text does.

    Args:
        compiler: of the model's grammars.
        num_threads: that masks may be computed by; default: as many as there are cores to use.
    """

    def __init__(self, compiler: Compiler, num_threads: int | None = None) -> None:
        self._compiler = compiler
        self._num_threads = min(num_threads or usable_cores(), _MAX_THREADS)
        self._held: dict[int, _Held] = {}
        self._executor: Any = None  # of llguidance; made for the first batch of several

    def open(
        self,
        slot: int,
        grammar: Grammar,
        known: Sequence[int],
        complete_within: int | None = None,
    ) -> None:
        """Begin with an answer's known tokens.

        Args:
            slot: the sequence's.
            grammar: what the answer has to match.
            known: token ids that the answer begins with.
            complete_within: tokens after which it should be complete; None: whenever it is.

        Raises:
            ValueError: the grammar cannot be compiled, or does not allow these tokens.
        """
        matcher = self._compiler.matcher(grammar)
        held, num_before = _Held(matcher, grammar), len(known)
        if complete_within is not None:
            endings = self._compiler.endings(grammar.eos_token_ids)
            num_before = min(max(complete_within - MAX_TOKENS, 0), num_before)
            held.countdown = Countdown(endings, complete_within - num_before)
        if num_before and not matcher.consume_tokens(list(known[:num_before])):
            raise ValueError(_no_match(matcher))
        for token_id in known[num_before:]:  # so that it ends as it would have
            assert held.countdown is not None
            held.countdown.choose(matcher, token_id)
            if not matcher.consume_token(token_id):
                raise ValueError(_no_match(matcher))
            held.countdown.pass_by(token_id)
        self._held[slot] = held

    def close(self, slot: int) -> None:
        """Forget a slot's matcher, if it has one."""
        self._held.pop(slot, None)

    def masks(self, slots: Sequence[int]) -> tuple[TokenMasks | None, dict[int, str]]:
        """What may come next in each of these slots.

        Returns:
            The masks of the rows whose slots have a grammar that has not ended (None where there
            are none), and the errors of slots whose grammar has become too large, by slot.
        """
        rows = [row for row, slot in enumerate(slots) if self._is_open(slot)]
        if not rows:
            return None, {}
        held = [self._held[slots[row]] for row in rows]
        num_words = self._compiler.num_words(held[0].grammar.eos_token_ids)
        words = np.zeros((len(rows), num_words), dtype=np.int32)
        self._fill([h.matcher for h in held], words)
        errors: dict[int, str] = {}
        for place, (row, one) in enumerate(zip(rows, held, strict=True)):
            if one.matcher.is_error():
                errors[slots[row]] = first_line(one.matcher.get_error())
                words[place] = -1  # the slot is at fault, and its token of no account
            elif one.grammar.ignore_eos:
                words[place] = _without(words[place], one.grammar.eos_token_ids)
        return TokenMasks(tuple(rows), words), errors

    def choose(self, slot: int, sampled: int) -> int:
        """A slot's next token: the sampled one, unless its answer could then not be completed."""
        held = self._held.get(slot)
        if held is None or held.countdown is None or held.matcher.is_stopped():
            return sampled
        return held.countdown.choose(held.matcher, sampled)

    def advance(self, slot: int, token_id: int) -> bool:
        """Take in a slot's next token; returns whether its grammar allows nothing after it.

        Raises:
            ValueError: the grammar does not allow the token.
        """
        held = self._held.get(slot)
        if held is None:
            return False
        if held.matcher.is_stopped():
            return True  # a token that overran the end, and counts for nothing
        if not held.matcher.consume_token(token_id):
            raise ValueError(first_line(held.matcher.get_error()))
        if held.countdown is not None:
            held.countdown.pass_by(token_id)
        return bool(held.matcher.is_stopped())

    def _is_open(self, slot: int) -> bool:
        held = self._held.get(slot)
        return held is not None and not held.matcher.is_stopped()

    def _fill(self, matchers: Sequence[Any], words: np.ndarray) -> None:
        from llguidance import LLExecutor
        from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

        if len(matchers) == 1 or self._num_threads == 1:
            for place, matcher in enumerate(matchers):
                fill_next_token_bitmask(matcher, words, place)
            return
        if self._executor is None:
            self._executor = LLExecutor(self._num_threads)
        places = [(matcher, place) for place, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._executor, places, words)


def _no_match(matcher: Any) -> str:
    return f"the known tokens do not match: {first_line(matcher.get_error())}"


def _without(words: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """A mask [W] without these tokens, unless it has no others."""
    left = words.copy()
    bits = left.view(np.uint32)
    for token_id in token_ids:
        bits[token_id // 32] &= ~np.uint32(1 << (token_id % 32))
    return left if left.any() else words

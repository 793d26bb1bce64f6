"""The prompts of the RULER tasks: each function makes one of at most, or exactly, a given length.

RULER: Hsieh et al., arXiv 2404.06654, section 3 and appendix B; the wording is our own. Needles and
variables hide in real text, and such prompts have exactly the length asked for; lists of words end
less than one round of words below it.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np

from saqqara.evaluation.prompts.prompt_maker import PromptMaker
from saqqara.evaluation.prompts.words import ADJECTIVES, NOUNS, draw_code, draw_key, draw_number

from .needle import ANSWER, FACT, QUESTION
from .question import Question

Make = Callable[[PromptMaker, int, np.random.Generator], Question]

NUM_KEYS = 4
NUM_VALUES = 4
NUM_HOPS = 4
NUM_COMMON = 10
COMMON_TIMES = 30
RARE_TIMES = 3
NUM_FREQUENT = 3
ZETA = 2.0
MAX_CODES = 2000

_VARIABLES = "Variables are assigned in the text below. Keep track of them.\n\n"
_MANY_QUESTION = "\n\nWhat are the magic numbers of {keys}?"
_MANY_ANSWER = "The magic numbers of {keys} are"
_VALUES_QUESTION = "\n\nWhat are all the magic numbers of {key}?"
_VALUES_ANSWER = "The magic numbers of {key} are"
_TRACE_QUESTION = "\n\nWhich {num} variables have the value {value}? Follow every assignment."
_TRACE_ANSWER = "The variables with the value {value} are: VAR"
_COMMON = "Below is a numbered list of words. Some words come much more often than others.\n\n"
_COMMON_QUESTION = "\n\nWhich {num} words come most often in the list?"
_COMMON_ANSWER = "The {num} words that come most often are:"
_CODES = "Below is a text of coded words; dots stand for noise. Count the coded words.\n\n"
_CODES_QUESTION = "\n\nWhich {num} coded words come most often? Ignore the dots."
_CODES_ANSWER = "The {num} coded words that come most often are:"


def niah_single(maker: PromptMaker, num_tokens: int, generator: np.random.Generator) -> Question:
    """One key with one value."""
    return _needles(maker, num_tokens, generator, "niah_single", 1, 1, 1)


def niah_multikey(maker: PromptMaker, num_tokens: int, generator: np.random.Generator) -> Question:
    """Several keys with a value each, of which one is asked for."""
    return _needles(maker, num_tokens, generator, "niah_multikey", NUM_KEYS, 1, 1)


def niah_multivalue(
    maker: PromptMaker, num_tokens: int, generator: np.random.Generator
) -> Question:
    """One key with several values, all asked for."""
    return _needles(maker, num_tokens, generator, "niah_multivalue", 1, NUM_VALUES, 1)


def niah_multiquery(
    maker: PromptMaker, num_tokens: int, generator: np.random.Generator
) -> Question:
    """Several keys with a value each, all asked for."""
    return _needles(maker, num_tokens, generator, "niah_multiquery", NUM_KEYS, 1, NUM_KEYS)


def _needles(
    maker: PromptMaker,
    num_tokens: int,
    generator: np.random.Generator,
    name: str,
    num_keys: int,
    num_values: int,
    num_asked: int,
) -> Question:
    while True:
        pairs: dict[str, list[str]] = {}
        while len(pairs) < num_keys:
            pairs[draw_key(generator)] = []
        values = _different(lambda: draw_number(generator), num_keys * num_values)
        for at, value in enumerate(values):
            list(pairs.values())[at % num_keys].append(value)
        facts = [FACT.format(key=key, value=value) for key, own in pairs.items() for value in own]
        generator.shuffle(facts)
        depths = generator.random(len(facts)).tolist()
        asked = [str(key) for key in generator.permutation(list(pairs))[:num_asked]]
        question, answer = _needle_ask(asked, num_values)
        secrets = [*pairs, *values]
        placed = list(zip(depths, facts, strict=True))
        token_ids = maker.hidden(num_tokens, placed, (question, answer), secrets, generator)
        if token_ids is not None:
            references = tuple(value for key in asked for value in pairs[key])
            return Question(token_ids, references, name, 16 * len(references), {"asked": asked})


def _needle_ask(asked: list[str], num_values: int) -> tuple[str, str]:
    if num_values > 1:
        question = _VALUES_QUESTION.format(key=asked[0])
        return question, _VALUES_ANSWER.format(key=asked[0])
    if len(asked) == 1:
        return QUESTION.format(key=asked[0]), ANSWER.format(key=asked[0])
    keys = ", ".join(asked[:-1]) + f" and {asked[-1]}"
    return _MANY_QUESTION.format(keys=keys), _MANY_ANSWER.format(keys=keys)


def variable_tracking(
    maker: PromptMaker, num_tokens: int, generator: np.random.Generator
) -> Question:
    """A chain of assignments in the order of the text; every variable of it is asked for."""
    while True:
        names = [name.upper() for name in _different(lambda: draw_code(generator, 5), NUM_HOPS + 1)]
        value = str(int(generator.integers(10_000, 100_000)))
        sources = [value, *(f"VAR {name}" for name in names)]
        facts = [
            f"\nRemember this: VAR {name} = {source}\n"
            for name, source in zip(names, sources, strict=False)
        ]
        depths = sorted(generator.random(len(facts)).tolist())
        texts = (
            _TRACE_QUESTION.format(num=len(names), value=value),
            _TRACE_ANSWER.format(value=value),
        )
        placed = list(zip(depths, facts, strict=True))
        token_ids = maker.hidden(
            num_tokens, placed, texts, [value, *names], generator, introduction=_VARIABLES
        )
        if token_ids is not None:
            return Question(token_ids, tuple(names), "variable_tracking", 48, {"value": value})


def common_words(maker: PromptMaker, num_tokens: int, generator: np.random.Generator) -> Question:
    """A shuffled list in which ten words come often and all others seldom.

    In RULER often is 30 times and seldom 3 times. In a list too short for that both shrink, down to
    4 times and once.

    Raises:
        ValueError: not even the shortest list fits.
    """
    pool = [str(word) for word in generator.permutation(sorted({*ADJECTIVES, *NOUNS}))]
    common, rare = pool[:NUM_COMMON], pool[NUM_COMMON:]
    question = _COMMON_QUESTION.format(num=NUM_COMMON)
    answer = _COMMON_ANSWER.format(num=NUM_COMMON)

    def message(times: int, rare_times: int, num_rare: int) -> str:
        words = [*common * times, *rare[:num_rare] * rare_times]
        # The order is a function of the words, so that longer lists are tried on equal terms.
        order = np.random.default_rng(len(words)).permutation(len(words))
        lines = [f"{i}. {words[at]}" for i, at in enumerate(order, start=1)]
        return _COMMON + "\n".join(lines) + question

    def fits(times: int, rare_times: int, num_rare: int) -> bool:
        return maker.num_tokens(message(times, rare_times, num_rare), answer) <= num_tokens

    rounds = [(COMMON_TIMES, RARE_TIMES), (12, 2), (6, 1), (4, 1)]
    for times, rare_times in rounds:
        if fits(times, rare_times, NUM_COMMON):
            num_rare = _largest(partial(fits, times, rare_times), len(rare))
            text = message(times, rare_times, num_rare)
            details = {"times": times, "rare_times": rare_times, "num_rare": num_rare}
            token_ids = maker.wrap(text, answer)
            return Question(token_ids, tuple(common), "common_words", 120, details)
    raise ValueError(f"lengths: {num_tokens} tokens are too few for a list of common words")


def frequent_words(maker: PromptMaker, num_tokens: int, generator: np.random.Generator) -> Question:
    """Coded words by a zeta distribution: the most frequent is noise, the next three are wanted.

    Raises:
        ValueError: the text would be too short to tell the frequencies apart.
    """
    codes = _different(lambda: draw_code(generator), MAX_CODES)
    weights = np.arange(1, MAX_CODES + 1, dtype=np.float64) ** -ZETA
    weights /= weights.sum()
    question = _CODES_QUESTION.format(num=NUM_FREQUENT)
    answer = _CODES_ANSWER.format(num=NUM_FREQUENT)

    def counts(total: int) -> list[int]:
        return [int(count) for count in np.floor(weights * total)]

    def message(total: int) -> str:
        found = zip(["...", *codes[1:]], counts(total), strict=True)
        words = [word for word, times in found for _ in range(times)]
        order = np.random.default_rng(total).permutation(len(words))
        return _CODES + " ".join(words[at] for at in order) + question

    total = _largest(lambda n: maker.num_tokens(message(n), answer) <= num_tokens, num_tokens)
    times = counts(total)[: NUM_FREQUENT + 2]
    if any(more <= less for more, less in pairwise(times)):
        raise ValueError(
            f"lengths: {num_tokens} tokens are too few to tell the most frequent words apart"
        )
    references = tuple(codes[1 : NUM_FREQUENT + 1])
    details = {"times": times}
    return Question(maker.wrap(message(total), answer), references, "frequent_words", 50, details)


TASKS: dict[str, Make] = {
    "niah_single": niah_single,
    "niah_multikey": niah_multikey,
    "niah_multivalue": niah_multivalue,
    "niah_multiquery": niah_multiquery,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
}


def _different(draw: Callable[[], str], count: int) -> list[str]:
    """Draw until there are so many different ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 0 to `most` up to which something fits, by halving."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low

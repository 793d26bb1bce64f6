"""Metrics of answers in text, each in [0, 1] against one reference. Our own small versions.

They follow what LongBench (arXiv 2308.14508, section 3) reports; where ours differ from the
official scripts, the docstring says so.
"""

import difflib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words_of(text: str) -> list[str]:
    """Lower-case words without articles and punctuation."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def characters_of(text: str) -> list[str]:
    """Characters without spaces and punctuation: units of Chinese text.

    The official scripts cut Chinese text into words with a dictionary.
    """
    # Unicode's categories of separators, control characters, punctuation and symbols.
    return [c for c in text.lower() if unicodedata.category(c)[0] not in "ZCPS"]


def f1(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall of the units that both have, with their counts."""
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def qa_f1(answer: str, reference: str) -> float:
    """F1 of words."""
    return f1(words_of(answer), words_of(reference))


def qa_f1_zh(answer: str, reference: str) -> float:
    """F1 of characters."""
    return f1(characters_of(answer), characters_of(reference))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), lower case, no stemming."""
    words = [re.findall(r"\w+", text.lower()) for text in (answer, reference)]
    return _rouge_l(words[0], words[1])


def rouge_l_zh(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of characters."""
    return _rouge_l(characters_of(answer), characters_of(reference))


def _rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    common = longest_common(answer, reference)
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def longest_common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above_left = 0
        for at, y in enumerate(b, start=1):
            above = row[at]
            row[at] = above_left + 1 if x == y else max(above, row[at - 1])
            above_left = above
    return row[-1]


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 / number of classes that the answer names, if the right one is among them.

    A class whose name is a part of the right class's name does not count as named.
    """
    named = [one for one in classes if one in answer]
    named = [one for one in named if one == reference or one not in reference]
    return 1 / len(named) if reference in named else 0.0


def retrieval(answer: str, reference: str) -> float:
    """Share of the numbers in the answer that are the paragraph's of the reference."""
    wanted = re.search(r"\d+", reference)
    if wanted is None:
        raise ValueError(f"answers: {reference!r} names no paragraph by its number")
    return count(answer, wanted[0])


def count(answer: str, reference: str) -> float:
    """Share of the numbers in the answer that are the reference."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference.strip()) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, reference: str) -> float:
    """Similarity of the answer's first line of code with the reference.

    `difflib`'s ratio; the official scripts take that of a fuzzy matching package, which is close.
    """
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return difflib.SequenceMatcher(None, code, reference, autojunk=False).ratio()

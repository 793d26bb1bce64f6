"""Real text to hide things in: one half to tune methods on, the other to report on."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from saqqara.cluster.engine.tokenizer import Tokenizer

from .corpus import pydoc_text

Split = Literal["tune", "report"]
SPLITS: tuple[Split, ...] = get_args(Split)
SUFFIXES = (".txt", ".md", ".rst")

_SENTENCE_END = re.compile(r"[.!?:]?[\"')]*\n\s*$|[.!?][\"')]*\s*$")


def read_text(folder: Path | None) -> str:
    """The text of a folder's files (.txt, .md, .rst; by path), or the topics of `pydoc`.

    Raises:
        ValueError: the folder has no such file, or one is not UTF-8.
    """
    if folder is None:
        return pydoc_text()
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in SUFFIXES]
    if not files:
        raise ValueError(f"haystack: {folder} has no files that end in {', '.join(SUFFIXES)}")
    try:
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack: a file in {folder} is not UTF-8: {error}") from None


def half(text: str, split: Split) -> str:
    """One of the two halves of a text, cut at the first line break from the middle on.

    Raises:
        ValueError: there is no such split, or nothing after a line break in the second half.
    """
    if split not in SPLITS:
        raise ValueError(f"split: must be {' or '.join(SPLITS)}, not {split!r}")
    cut = text.find("\n", len(text) // 2) + 1
    if cut == 0 or cut == len(text):
        raise ValueError("haystack: the text cannot be cut in halves; it has too few lines")
    return text[:cut] if split == "tune" else text[cut:]


@dataclass(frozen=True, slots=True)
class Haystack:
    """One half of a text, in tokens.

    Attributes:
        token_ids: of the whole half, without special tokens.
        ends: numbers of tokens, ascending, after which a sentence or a line ends; 0 is the first.
    """

    token_ids: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def load(cls, tokenizer: Tokenizer, folder: Path | None, split: Split) -> "Haystack":
        """Read and encode a half; the last few are remembered, for reports of many tasks.

        Raises:
            ValueError: as `read_text` and `half`.
        """
        return _load(tokenizer, folder, split)

    @classmethod
    def of_text(cls, tokenizer: Tokenizer, text: str) -> "Haystack":
        """A text as it stands."""
        ids = tokenizer.encode(text, add_special_tokens=False)
        closing = {i for i in set(ids) if _SENTENCE_END.search(tokenizer.token_text(i))}
        ends = [0, *(at for at, token in enumerate(ids, start=1) if token in closing)]
        return cls(tuple(ids), tuple(ends))

    def piece(self, num_tokens: int, generator: np.random.Generator) -> "Haystack":
        """A run of tokens from a random start of a sentence or line.

        Raises:
            ValueError: the text is shorter than that.
        """
        last = len(self.token_ids) - num_tokens
        if last < 0:
            raise ValueError(
                f"haystack: this half of the text has {len(self.token_ids)} tokens and "
                f"{num_tokens} are needed; give a folder with more text, or shorter prompts"
            )
        starts = [end for end in self.ends if end <= last]
        start = starts[int(generator.integers(len(starts)))]
        stop = start + num_tokens
        ends = tuple(end - start for end in self.ends if start <= end <= stop)
        return Haystack(self.token_ids[start:stop], ends)

    def boundary(self, depth: float) -> int:
        """The end of a sentence or line that is nearest to a depth (0 is the start, 1 the end)."""
        target = depth * len(self.token_ids)
        return min((*self.ends, len(self.token_ids)), key=lambda end: (abs(end - target), end))

    def insert(self, pieces: list[tuple[float, list[int]]]) -> list[int]:
        """The tokens with others put in at the boundaries nearest to given depths.

        Pieces at the same boundary keep their order.
        """
        placed = sorted((self.boundary(depth), at) for at, (depth, _) in enumerate(pieces))
        out: list[int] = []
        done = 0
        for boundary, at in placed:
            out += [*self.token_ids[done:boundary], *pieces[at][1]]
            done = boundary
        return [*out, *self.token_ids[done:]]


@lru_cache(maxsize=4)
def _load(tokenizer: Tokenizer, folder: Path | None, split: Split) -> Haystack:
    return Haystack.of_text(tokenizer, half(read_text(folder), split))

"""What a prompt is expected to need under its retention, before any worker has seen it.

Shapes: L layers, H kv heads of the model, W workers, P page_tokens.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.growth import (
    Cycle,
    TrimmedRows,
    cycle_of,
    remembers_normalisers,
    ring_size,
    trimmed_rows,
)
from saqqara.compression.retention import Retention
from saqqara.workers.plan import WorkerInfo

Ints = NDArray[np.int64]

_LAST_ANSWERS = 128  # that are remembered
_ENDLESS = 1 << 40


@dataclass(frozen=True, slots=True)
class TabulatedGrowth:
    """Rows that grow together, one entry per fed token; with a `cycle` they shrink together, too.

    `base` int64 [W] pages after prefill; `crossings` int64 [W, P] pages that the first k < P tokens
    after the prompt add; `rows` int64 [W] rows, each of which takes a page more every P tokens.
    """

    base: Ints
    crossings: Ints
    rows: Ints
    cycle: Cycle | None = None

    def most(self, num_tokens: int) -> Ints:
        """The most pages, int64 [W], while so many tokens are fed after the prompt."""
        if self.cycle is not None:
            num_tokens = min(num_tokens, self.cycle.most)
        num_pages, rest = divmod(num_tokens, self.crossings.shape[1])
        need: Ints = self.base + num_pages * self.rows + self.crossings[:, rest]
        return need


class TrimmedGrowth:
    """Rows that PyramidInfer's generation stage trims: numbers per layer, counted step by step.

    What it cuts follows from numbers of tokens alone (`compression.growth.TrimmedRows`), so the
    count here is that of the workers.

    Attributes:
        rows: how they come out of prefill.
    """

    def __init__(self, rows: TrimmedRows, workers: Sequence[WorkerInfo]) -> None:
        self.rows = rows
        self._page_tokens = workers[0].page_tokens
        layers = np.arange(len(rows.stored))
        self._heads_WL: Ints = np.array(
            [
                ((w.start_layer <= layers) & (layers < w.stop_layer)) * (w.stop_head - w.start_head)
                for w in workers
            ],
            dtype=np.int64,
        )
        self._run = rows.copy()
        self._most = [self.pages(rows.stored)]  # by fed tokens

    def pages(self, stored_L: Ints) -> Ints:
        """Pages on each worker, int64 [W], of rows of these lengths."""
        pages: Ints = self._heads_WL @ -(-stored_L // self._page_tokens)
        return pages

    def stored_on(self, rank: int) -> Ints:
        """Tokens that the rows of a worker's own layers store after prefill, int64 [L]."""
        stored: Ints = self.rows.stored[self._heads_WL[rank] > 0]
        return stored

    def most(self, num_tokens: int) -> Ints:
        """The most pages, int64 [W], while so many tokens are fed one by one after the prompt."""
        while len(self._most) <= num_tokens:
            peak = self.pages(self._run.stored + 1)
            self._run.feed(1)
            self._most.append(np.maximum(self._most[-1], peak))
        return self._most[num_tokens]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a prompt is expected to need once it is retained; exact unless `ragged`.

    `rows` int32 [L, H] expected kept tokens; `growth` says what they take in pages, now and while
    tokens are fed after the prompt. `ring_bytes`, int64 [W], are those of the ring of queries
    (`workers/state/rings.py`) that a sequence has beside the pool as long as it holds its slot.
    """

    rows: NDArray[np.int32]
    growth: TabulatedGrowth | TrimmedGrowth
    ring_bytes: Ints
    ragged: bool

    def most(self, num_tokens: int = 0) -> Ints:
        """Pages, int64 [W], that are needed at most while so many tokens are fed after it."""
        return self.growth.most(num_tokens)


class OutputLengths:
    """How long answers turn out to be, to say how long those under way are expected to get.

    Expected of an answer is the mean of the last ones that got longer than it is now. One that
    was cut off by a limit of its own says nothing of answers that may be longer. Where none is
    left to go by it is `unknown_tokens`, and of one that has as many, so many more.

    Args:
        unknown_tokens: expected of an answer while nothing is known.
    """

    def __init__(self, unknown_tokens: int) -> None:
        self._unknown_tokens = unknown_tokens
        self._num_tokens: deque[int] = deque(maxlen=_LAST_ANSWERS)
        self._limits: deque[int] = deque(maxlen=_LAST_ANSWERS)

    def add(self, num_tokens: int, *, is_cut_off: bool) -> None:
        """Note an answer that has ended; cut off it is by the most tokens that it may have."""
        self._num_tokens.append(num_tokens)
        self._limits.append(num_tokens if is_cut_off else _ENDLESS)

    def expected(self, num_tokens: Ints, most_tokens: Ints) -> Ints:
        """Tokens of whole answers, int64 [N], that now have so many [N] of at most so many [N]."""
        passed = num_tokens >= self._unknown_tokens
        unknown = np.where(passed, num_tokens, 0) + self._unknown_tokens
        lengths, limits = np.array(self._num_tokens), np.array(self._limits)
        counts_NM = (lengths > num_tokens[:, None]) & (limits >= most_tokens[:, None])
        num_N = counts_NM.sum(axis=1)
        means = (counts_NM * lengths).sum(axis=1) / np.maximum(num_N, 1)
        expected = np.where(num_N > 0, np.ceil(means).astype(np.int64), unknown)
        expected = np.maximum(expected, num_tokens + 1)
        return np.minimum(expected, most_tokens)


def demand_of(retention: Retention, prompt_tokens: int, workers: Sequence[WorkerInfo]) -> Demand:
    """The demand of a prompt of this length."""
    num_layers = max(w.stop_layer for w in workers)
    num_heads = max(w.stop_head for w in workers)
    rows = retention.row_tokens(prompt_tokens, num_layers, num_heads)
    trimmed = trimmed_rows(retention, prompt_tokens, num_layers)
    growth: TabulatedGrowth | TrimmedGrowth
    if trimmed is not None:
        growth = TrimmedGrowth(trimmed, workers)
    else:
        growth = _tabulated(retention, prompt_tokens, rows, workers)
    ragged = retention.ragged and retention.drops(prompt_tokens)
    return Demand(rows, growth, _ring_bytes(retention, prompt_tokens, workers), ragged)


def tabulate(rows: NDArray[np.int32], page_tokens: int) -> tuple[int, Ints]:
    """Pages of some rows, and what the first k tokens fed to all of them add, int64 [P]."""
    base = int((-(-rows // page_tokens)).sum())
    last_page = np.bincount((rows % page_tokens).ravel(), minlength=page_tokens)
    # The j-th token (from 0) opens a page in the rows whose last page has -j (mod P) entries.
    opened = last_page[-np.arange(page_tokens) % page_tokens]
    return base, np.concatenate(([0], np.cumsum(opened)[:-1]))


def _tabulated(
    retention: Retention,
    prompt_tokens: int,
    rows: NDArray[np.int32],
    workers: Sequence[WorkerInfo],
) -> TabulatedGrowth:
    page_tokens = workers[0].page_tokens
    base = np.zeros(len(workers), dtype=np.int64)
    crossings = np.zeros((len(workers), page_tokens), dtype=np.int64)
    for rank, worker in enumerate(workers):
        mine = rows[worker.start_layer : worker.stop_layer, worker.start_head : worker.stop_head]
        base[rank], crossings[rank] = tabulate(mine, page_tokens)
        if retention.ragged and retention.drops(prompt_tokens):
            # Heads may divide a layer's tokens in any way: at most one part-filled page each.
            per_layer = -(-mine.sum(axis=1) // page_tokens) + mine.shape[1]
            most = mine.size * -(-prompt_tokens // page_tokens)
            base[rank] = min(int(per_layer.sum()), most)
    cycle = cycle_of(retention, prompt_tokens, page_tokens)
    return TabulatedGrowth(base, crossings, rows_per_worker(workers), cycle)


def rows_per_worker(workers: Sequence[WorkerInfo]) -> Ints:
    """Rows that one sequence has on each worker, int64 [W]."""
    rows = [(w.stop_layer - w.start_layer) * (w.stop_head - w.start_head) for w in workers]
    return np.array(rows, dtype=np.int64)


def _ring_bytes(
    retention: Retention, prompt_tokens: int, workers: Sequence[WorkerInfo]
) -> NDArray[np.int64]:
    """Bytes of the ring of a sequence with such a prompt, int64 [W]; normalisers included."""
    normalised = remembers_normalisers(retention)
    sizes = [
        ring_size(retention, prompt_tokens, worker.max_model_len)
        * (worker.ring_query_bytes + normalised * worker.ring_normaliser_bytes)
        for worker in workers
    ]
    return np.array(sizes, dtype=np.int64)

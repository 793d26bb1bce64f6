"""What a prompt is expected to need under its retention, before any worker has seen it.

Shapes: L layers, H kv heads of the model, W workers, P page_tokens.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

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
from saqqara.workers.plan import WorkerInfo, layers_of

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LocalRows:
    """Rows of layers that see a window: they grow by an entry per fed token until it is full.

    `rows` int64 [W]; `tokens` that each holds after prefill; `window`, the most it ever holds.
    """

    rows: Ints
    tokens: int
    window: int

    def pages(self, fed_tokens: int, page_tokens: int) -> Ints:
        """Pages, int64 [W], once so many tokens are fed after the prompt."""
        pages: Ints = self.rows * -(-min(self.tokens + fed_tokens, self.window) // page_tokens)
        return pages


@dataclass(frozen=True, slots=True)
class TabulatedGrowth:
    """Rows that grow together, one entry per fed token; with a `cycle` they shrink together, too.

    `base` int64 [W] pages after prefill; `crossings` int64 [W, P] pages that the first k < P tokens
    after the prompt add; `rows` int64 [W] rows, each of which takes a page more every P tokens. All
    of these are of global layers; `local` has the rows of the others.
    """

    base: Ints
    crossings: Ints
    rows: Ints
    local: LocalRows
    cycle: Cycle | None = None

    def most(self, num_tokens: int) -> Ints:
        """The most pages, int64 [W], while so many tokens are fed after the prompt."""
        page_tokens = self.crossings.shape[1]
        need = self.local.pages(num_tokens, page_tokens)
        if self.cycle is not None:
            num_tokens = min(num_tokens, self.cycle.most)
        num_pages, rest = divmod(num_tokens, page_tokens)
        need += self.base + num_pages * self.rows + self.crossings[:, rest]
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


class TrimmedSlot:
    """Pages of one sequence. A worker that refused it holds, and is charged, none."""

    def __init__(self, growth: TrimmedGrowth, reserve_tokens: int) -> None:
        self.growth = growth
        self.rows = growth.rows.copy()
        self.holds_W: Ints = np.ones_like(growth.most(0))
        self._reserve = reserve_tokens
        self._fed = 0

    def copy(self) -> "TrimmedSlot":
        """Another one that goes its own way from here."""
        other = copy(self)
        other.rows, other.holds_W = self.rows.copy(), self.holds_W.copy()
        return other

    def held(self) -> Ints:
        """Pages, int64 [W], between steps."""
        return self.holds_W * self.growth.pages(self.rows.stored)

    def charged(self) -> Ints:
        """The most ever, until the replay is through."""
        if self._fed < self._reserve:
            return self.holds_W * self.growth.most(self._reserve)
        return self.held()

    def peak(self, num_tokens: int) -> Ints:
        """Pages, int64 [W], while a step feeds so many tokens."""
        fed = self.holds_W * self.growth.pages(self.rows.stored + num_tokens)
        peak: Ints = np.maximum(fed, self.charged())
        return peak

    def grown(self, fed_tokens: int) -> Ints:
        """By layer [L]; of fewer tokens than it was fed, which overran a stop, by feeding again."""
        rows = self.rows
        if fed_tokens != self._fed:
            rows = self.growth.rows.copy()
            for _ in range(fed_tokens):
                rows.feed(1)
        return rows.stored - self.growth.rows.stored

    def feed(self, num_tokens: int) -> Ints:
        """Count the tokens of a step; the pages [W] that are given back at its end."""
        peak = self.peak(num_tokens)
        self.rows.feed(num_tokens)
        self._fed += num_tokens
        returned: Ints = peak - self.charged()
        return returned


@dataclass(frozen=True, slots=True)
class SlotPageCounts:
    """What is counted for one slot, of either kind of rows; `trimmed` is None for the other."""

    tabulated: tuple[Ints, ...]
    trimmed: TrimmedSlot | None


@dataclass(frozen=True, slots=True)
class Charge:
    """What the ledger has on one slot, to go on with in another: every number, and its pages."""

    numbers: tuple[NDArray[np.generic], ...]
    pages: SlotPageCounts


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


def demand_of(retention: Retention, prompt_tokens: int, workers: Sequence[WorkerInfo]) -> Demand:
    """The demand of a prompt of this length."""
    layers = layers_of(workers)
    num_heads = max(w.stop_head for w in workers)
    rows = retention.row_tokens(prompt_tokens, layers, num_heads)
    trimmed = trimmed_rows(retention, prompt_tokens, layers)
    growth: TabulatedGrowth | TrimmedGrowth
    if trimmed is not None:
        growth = TrimmedGrowth(trimmed, workers)
    else:
        growth = _tabulated(retention, prompt_tokens, rows, workers)
    ragged = retention.ragged and retention.drops(prompt_tokens)
    return Demand(rows, growth, _ring_bytes(retention, prompt_tokens, workers), ragged)


def resumed_demand(
    demand: Demand, held: NDArray[np.int32], new_tokens: int, workers: Sequence[WorkerInfo]
) -> Demand:
    """The demand of a prompt whose rows begin with what its conversation holds.

    Until its prefill is through, each row takes what it has or what it is to have, if that is more.
    Heads that divide the tokens of their layer may do so in any way, but no row has more than it
    held and the new ones.

    Args:
        demand: of the whole prompt, of rows that are cut by no trimming.
        held: tokens of each row, int32 [L, H].
        new_tokens: of the prompt, that are computed.
        workers: every rank's shard.
    """
    assert isinstance(demand.growth, TabulatedGrowth), "rows that are trimmed go on by no turn"
    page_tokens = workers[0].page_tokens
    rows = np.minimum(demand.rows, held + np.int32(new_tokens))
    most, layer_tokens = np.maximum(rows, held), demand.rows.sum(axis=1)
    base, crossings = np.zeros_like(demand.growth.base), np.zeros_like(demand.growth.crossings)
    for rank, (worker, sees_all) in enumerate(zip(workers, global_layers(workers), strict=True)):
        layers, heads = (
            slice(worker.start_layer, worker.stop_layer),
            slice(worker.start_head, worker.stop_head),
        )
        if demand.ragged:
            before, tokens = held[layers, heads][sees_all], layer_tokens[layers][sees_all]
            table = tabulate_resumed(before, new_tokens, tokens, page_tokens)
        else:
            table = tabulate(most[layers, heads][sees_all], page_tokens)
        base[rank], crossings[rank] = table
    growth = replace(demand.growth, base=base, crossings=crossings)
    return replace(demand, rows=rows, growth=growth)


def tabulate(rows: NDArray[np.int32], page_tokens: int) -> tuple[int, Ints]:
    """Pages of some rows, and what the first k tokens fed to all of them add, int64 [P]."""
    base = int((-(-rows // page_tokens)).sum())
    last_page = np.bincount((rows % page_tokens).ravel(), minlength=page_tokens)
    # The j-th token (from 0) opens a page in the rows whose last page has -j (mod P) entries.
    opened = last_page[-np.arange(page_tokens) % page_tokens]
    return base, np.concatenate(([0], np.cumsum(opened)[:-1]))


def tabulate_ragged(
    rows: NDArray[np.int32], prompt_tokens: int, page_tokens: int
) -> tuple[int, Ints]:
    """The same at most, where heads may divide the tokens of their layer [L, H] in any way.

    Each row has at most one page that is part-filled, and no more tokens than were fed.
    """
    fed = np.arange(page_tokens)
    num_heads = rows.shape[1]
    tokens = rows.sum(axis=1)[:, None] + num_heads * (fed + page_tokens - 1)
    whole = num_heads * -(-(prompt_tokens + fed) // page_tokens)
    most = np.minimum(tokens // page_tokens, whole).sum(axis=0)
    return int(most[0]), most - most[0]


def tabulate_resumed(
    held: NDArray[np.int32], new_tokens: int, layer_tokens: NDArray[np.int64], page_tokens: int
) -> tuple[int, Ints]:
    """As `tabulate_ragged`, of rows that begin with tokens which they keep until they are redone.

    Args:
        held: by each row of a worker, [L, H].
        new_tokens: of the prompt, that are computed.
        layer_tokens: that all heads of the model divide, [L].
        page_tokens: tokens of a page.
    """
    fed = np.arange(page_tokens)
    num_heads = held.shape[1]
    uncut_LHP = held[:, :, None] + new_tokens + fed
    tokens_LP = layer_tokens[:, None] + num_heads * fed
    pages_LP = (tokens_LP + num_heads * (page_tokens - 1)) // page_tokens
    pages_LP = np.minimum(pages_LP, (-(-uncut_LHP // page_tokens)).sum(axis=1))
    before_L = (-(-held // page_tokens)).sum(axis=1)
    most = np.maximum(pages_LP, before_L[:, None]).sum(axis=0)
    return int(most[0]), most - most[0]


def _tabulated(
    retention: Retention,
    prompt_tokens: int,
    rows: NDArray[np.int32],
    workers: Sequence[WorkerInfo],
) -> TabulatedGrowth:
    page_tokens, window = workers[0].page_tokens, layers_of(workers).window
    base = np.zeros(len(workers), dtype=np.int64)
    crossings = np.zeros((len(workers), page_tokens), dtype=np.int64)
    for rank, (worker, sees_all) in enumerate(zip(workers, global_layers(workers), strict=True)):
        mine = rows[worker.start_layer : worker.stop_layer, worker.start_head : worker.stop_head]
        mine = mine[sees_all]
        if retention.ragged and retention.drops(prompt_tokens):
            base[rank], crossings[rank] = tabulate_ragged(mine, prompt_tokens, page_tokens)
        else:
            base[rank], crossings[rank] = tabulate(mine, page_tokens)
    cycle = cycle_of(retention, prompt_tokens, page_tokens)
    rows_W = global_rows(workers)
    local = LocalRows(rows_per_worker(workers) - rows_W, min(prompt_tokens, window), window)
    return TabulatedGrowth(base, crossings, rows_W, local, cycle)


def rows_per_worker(workers: Sequence[WorkerInfo]) -> Ints:
    """Rows that one sequence has on each worker, int64 [W]."""
    rows = [(w.stop_layer - w.start_layer) * (w.stop_head - w.start_head) for w in workers]
    return np.array(rows, dtype=np.int64)


def global_rows(workers: Sequence[WorkerInfo]) -> Ints:
    """Of them, those of layers that see all tokens, int64 [W]."""
    pairs = zip(workers, global_layers(workers), strict=True)
    rows = [int(sees_all.sum()) * (w.stop_head - w.start_head) for w, sees_all in pairs]
    return np.array(rows, dtype=np.int64)


def global_layers(workers: Sequence[WorkerInfo]) -> list[NDArray[np.bool_]]:
    """Which of its own layers see all tokens, for each worker, bool [L]."""
    sees_all = np.array(layers_of(workers).windows) == 0
    return [sees_all[w.start_layer : w.stop_layer] for w in workers]


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

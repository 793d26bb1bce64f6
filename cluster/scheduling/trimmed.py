"""Pages of sequences that are trimmed while they decode: numbers per layer, counted step by step.

What PyramidInfer's generation stage cuts follows from numbers of tokens alone, layer by layer
(`compression.growth.TrimmedRows`), so the ledger runs the same count as the workers.

Shapes: L layers, W workers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.growth import TrimmedRows
from saqqara.workers.plan import WorkerInfo

Ints = NDArray[np.int64]


class TrimmedDemand:
    """What prompts of one length and retention need; `rows` is how they come out of prefill."""

    def __init__(self, rows: TrimmedRows, workers: Sequence[WorkerInfo]) -> None:
        self._rows = rows
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

    def most(self, num_tokens: int) -> Ints:
        """The most pages, int64 [W], while so many tokens are fed one by one after the prompt."""
        while len(self._most) <= num_tokens:
            peak = self.pages(self._run.stored + 1)
            self._run.feed(1)
            self._most.append(np.maximum(self._most[-1], peak))
        return self._most[num_tokens]

    def sequence(self, reserve_tokens: int) -> "TrimmedPages":
        """A sequence that starts with such a prompt; so many tokens it will replay."""
        return TrimmedPages(self, self._rows.copy(), reserve_tokens)


class TrimmedPages:
    """Pages of one sequence. A worker that refused it holds, and is charged, none."""

    def __init__(self, demand: TrimmedDemand, rows: TrimmedRows, reserve_tokens: int) -> None:
        self._demand = demand
        self._rows = rows
        self._reserve = reserve_tokens
        self._fed = 0
        self._holds_W: Ints = np.ones_like(demand.most(0))

    @property
    def stored(self) -> Ints:
        """Tokens that each layer's rows store between steps, int64 [L]."""
        return self._rows.stored

    @property
    def room(self) -> int:
        """Tokens that one step may feed."""
        return self._rows.room

    def held(self) -> Ints:
        """Pages between steps, int64 [W]."""
        return self._holds_W * self._demand.pages(self._rows.stored)

    def charged(self) -> Ints:
        """Pages that are charged between plans: the most ever, until the replay is through."""
        if self._fed < self._reserve:
            return self._holds_W * self._demand.most(self._reserve)
        return self.held()

    def peak(self, num_tokens: int) -> Ints:
        """Pages that must be charged while a step feeds so many tokens, before it cuts."""
        fed = self._holds_W * self._demand.pages(self._rows.stored + num_tokens)
        peak: Ints = np.maximum(fed, self.charged())
        return peak

    def feed(self, num_tokens: int) -> None:
        """Count the tokens of a step."""
        self._rows.feed(num_tokens)
        self._fed += num_tokens

    def refuse(self, rank: int) -> None:
        """Note that a worker holds nothing of the sequence."""
        self._holds_W[rank] = 0

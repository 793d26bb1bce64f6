"""Prefixes are found by halving, and from what was found before: as if each block was looked up."""

import random
from collections.abc import Sequence as Many

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.fake_replica import make_workers

from saqqara.cluster.reuse import prefixes
from saqqara.cluster.reuse.cached import CachedPrefixes, Use
from saqqara.cluster.reuse.limits import Cuts
from saqqara.cluster.reuse.prefixes import NOTHING, Block, Found, Prefixes, block_keys
from saqqara.compression.retention import Retention

RETENTIONS = [
    Retention.parse("full"),
    Retention.parse({"method": "snapkv", "window": 1, "sinks": 0, "budget": 2}),
]
TREE = ((1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 7), (1, 2, 8, 9), (1, 2), (9, 8, 7), (9, 8, 7, 6, 5, 4))
KEYS = [block_keys(tokens, 1) for tokens in TREE]


class Pool:
    """Pages of one worker with one row."""

    def __init__(self) -> None:
        self.free = np.array([12], dtype=np.int64)
        self.rows_per_worker = np.array([1], dtype=np.int64)

    def set_aside(self, pages_W: NDArray[np.int64]) -> None:
        self.free -= pages_W

    def take_back(self, pages_W: NDArray[np.int64]) -> None:
        self.free += pages_W


class Counted(Prefixes):
    """Knows how many blocks were looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.num_lookups = 0

    def _is_ready(self, key: bytes) -> bool:
        self.num_lookups += 1
        return super()._is_ready(key)

    def find_slowly(self, keys: Many[bytes], most_blocks: int) -> Found:
        """The definition."""
        found: list[Block] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            if len(found) == most_blocks:
                return Found(tuple(found))
            if not block.is_ready:
                return Found(tuple(found), is_coming=True)
            found.append(block)
        storable: list[bytes] = []
        for key in keys[len(found) :]:
            if self._seen.get(key, 0) < 2:
                break
            storable.append(key)
        return Found(tuple(found), storable=tuple(storable))


class Traffic:
    """Random requests that see, use, fill, spoil and leave blocks, in any order that may be."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.index = Counted()
        self.last: dict[int, Found] = {}
        self.outcomes: set[str] = set()
        self._start()

    def _start(self) -> None:
        self.cached = CachedPrefixes(self.index, Pool(), 10, 1, Cuts(make_workers(12)))
        self.filling: list[Use] = []
        self.holding: list[Use] = []

    def step(self) -> None:
        do = self.random.choice([self._see, self._begin, self._begin, self._go_on, self._end])
        if self.random.random() < 0.1:
            do = self.random.choice([self._spoil, self._evict, self._evict, self._start])
        do()

    def check(self) -> None:
        """What is found is what the definition says, whichever most may be used this time."""
        for number, keys in enumerate(KEYS):
            most = self.random.randint(0, len(keys))
            found = self.cached.find(keys, most, self.last.get(number, NOTHING))
            slow = self.index.find_slowly(keys, most)
            assert found == slow, (TREE[number], most)
            if self.random.random() < 0.7:
                self.last[number] = found
            self.outcomes |= {"coming"} if slow.is_coming else set()
            self.outcomes |= {"both"} if slow.blocks and slow.storable else set()

    def _see(self) -> None:
        self.cached.see(self.random.choice(KEYS))

    def _begin(self) -> None:
        number = self.random.randrange(len(KEYS))
        self.cached.see(KEYS[number])
        found = self.cached.find(KEYS[number], self.random.randint(0, len(KEYS[number])))
        if found.is_coming:
            return
        use = self.cached.use(found, self.random.choice(RETENTIONS), len(KEYS[number]))
        if self.random.random() < 0.2:
            self.cached.undo(use)
            return
        self.cached.store(use, found, np.array([self.random.randint(0, 3)]))
        self.filling.append(use)

    def _go_on(self) -> None:
        if self.filling:
            use = self.filling.pop(self.random.randrange(len(self.filling)))
            use.is_through = True
            self.cached.settle(use)
            self.holding.append(use)

    def _end(self) -> None:
        uses = self.random.choice([self.filling, self.holding])
        if uses:
            self.cached.leave(uses.pop(self.random.randrange(len(uses))))

    def _spoil(self) -> None:
        if self.filling:
            self.cached.doom(self.random.choice(self.filling))

    def _evict(self) -> None:
        self.cached.give(np.array([self.random.randint(0, 12)]))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_what_is_found_is_what_looking_up_each_block_finds(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "MAX_SEEN", 14)  # of 16 keys
        traffic = Traffic(seed)
        for _ in range(120):
            traffic.step()
            traffic.check()
    assert traffic.outcomes == {"coming", "both"}, "the traffic is too tame"


def test_a_long_prompt_that_waits_looks_up_few_of_its_blocks() -> None:
    index = Counted()
    keys = block_keys(range(4096), 1)
    index.see(keys)
    index.see(keys)
    index.set_ready(index.store(keys[:-9]))
    found = index.find(keys, 4096)
    assert (len(found.blocks), len(found.storable)) == (4087, 9)
    index.num_lookups = 0
    assert index.find(keys, 4096, found) is found, "nothing is copied"
    assert index.num_lookups <= 13

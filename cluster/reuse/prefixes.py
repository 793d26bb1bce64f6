"""Which prefixes of prompts are cached: hashes, counts and pins of blocks. Integers, no tensors.

A block stands for `page_tokens` adjacent tokens of a prompt and all tokens before them, so blocks
form chains from a prompt's start. Who may share them is part of every hash. Only what came twice
is stored, and what was used longest ago goes first.
"""

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_SEEN = 2**17  # keys that are remembered for having been seen

_MANY = 2  # a prefix that came so often is stored


def block_keys(
    token_ids: Sequence[int],
    page_tokens: int,
    owner: str = "",
    cache_salt: str = "",
    cut: int | None = None,
) -> tuple[bytes, ...]:
    """A key for each full block of a prompt: a hash of its tokens, of those before it and the salt.

    Blocks of prompts that drop tokens behind the layer `cut` have other contents: it is part of the
    salt. Its parts are told apart by their lengths, so no two salts have the same keys.
    """
    key = hashlib.blake2b(digest_size=32)
    for part in (owner, cache_salt, *([] if cut is None else [str(cut)])):
        data = part.encode("utf-8", "surrogatepass")
        key.update(len(data).to_bytes(8) + data)
    tokens = np.asarray(token_ids, dtype=np.int32).tobytes()
    size, digest, keys = 4 * page_tokens, key.digest(), []
    for start in range(0, len(tokens) - size + 1, size):
        block = digest + tokens[start : start + size]
        digest = hashlib.blake2b(block, digest_size=32).digest()
        keys.append(digest)
    return tuple(keys)


@dataclass(slots=True, eq=False)
class Block:
    """A block that has pages on every worker. Until it `is_ready` a prefill is still filling it.

    Of its pins so many are `num_quiet`: those of conversations that wait for their next turn.
    """

    block_id: int
    key: bytes
    num_pins: int = 0
    num_quiet: int = 0
    is_ready: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What there is for a prompt.

    Attributes:
        blocks: of its first tokens, that can be used.
        is_coming: whether the block after these is being stored by another prefill.
        storable: keys of the blocks after these that are worth to be stored.
    """

    blocks: tuple[Block, ...] = ()
    is_coming: bool = False
    storable: tuple[bytes, ...] = ()


NOTHING = Found()


@dataclass(slots=True, eq=False)
class Counts:
    """Blocks that were stored and given up since the start."""

    stored: int = 0
    evicted: int = 0


class Prefixes:
    """The blocks of one replica.

    Blocks that nobody has pinned are idle, and can be evicted in the order in which they were last
    used. Of a chain the last block counts as used first, and whoever uses a block uses those before
    it: so the idle block that goes first never has another one behind it.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self._next_id = 0
        self.forget()

    def forget(self) -> None:
        """No worker holds any block any more; what was seen stays known."""
        self._blocks: dict[bytes, Block] = {}
        self._idle: OrderedDict[Block, None] = OrderedDict()
        self._num_held = 0
        self._num_quiet = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that have pages, whatever they are worth."""
        return self._num_held

    @property
    def num_idle(self) -> int:
        """Blocks that could be evicted now."""
        return len(self._idle)

    @property
    def num_quiet(self) -> int:
        """Blocks that only conversations have pinned that wait for their next turn."""
        return self._num_quiet

    def see(self, keys: Sequence[bytes]) -> None:
        """A request has come with such a prompt."""
        for key in reversed(keys):
            self._seen[key] = min(self._seen.pop(key, 0) + 1, _MANY)
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)

    def find(self, keys: Sequence[bytes], most_blocks: int, last: Found = NOTHING) -> Found:
        """What there is for a prompt with these keys, of which so many blocks may be used.

        Of a chain what is ready, held or seen often enough comes first: whoever stores, uses or
        sees a block does so with all before it, and its end goes first. So where each ends is
        found by halving, and only blocks are looked up that `last` lacks, which was found for these
        keys before.
        """
        num_ready = bisect_left(keys, True, key=lambda key: not self._is_ready(key))
        num_used = min(num_ready, most_blocks)
        blocks = self._chain(keys, num_used, last.blocks)
        if num_used < len(keys) and keys[num_used] in self._blocks:
            is_coming = num_used < most_blocks
            return _found(blocks, is_coming, (), last)
        stop = bisect_left(keys, True, lo=num_used, key=lambda key: self._seen.get(key, 0) < _MANY)
        same = last.storable
        if len(same) != stop - num_used or (same and same[-1] != keys[stop - 1]):
            same = tuple(keys[num_used:stop])
        return _found(blocks, False, same, last)

    def _is_ready(self, key: bytes) -> bool:
        block = self._blocks.get(key)
        return block is not None and block.is_ready

    def _chain(
        self, keys: Sequence[bytes], num_blocks: int, known: tuple[Block, ...]
    ) -> tuple[Block, ...]:
        """The first blocks of a chain, of which those that are `known` and still held are taken."""
        # A block that is held has been so since it was found, and all before it.
        num_same = bisect_left(
            known,
            True,
            hi=min(len(known), num_blocks),
            key=lambda block: self._blocks.get(block.key) is not block,
        )
        if num_same == num_blocks == len(known):
            return known
        return (*known[:num_same], *(self._blocks[key] for key in keys[num_same:num_blocks]))

    def store(self, keys: Sequence[bytes]) -> tuple[Block, ...]:
        """Blocks for these keys, which a prefill is to fill."""
        blocks = []
        for key in keys:
            assert key not in self._blocks, "a block is stored twice"
            self._blocks[key] = block = Block(self._next_id, key)
            blocks.append(block)
            self._next_id += 1
        self._num_held += len(blocks)
        self.counts.stored += len(blocks)
        return tuple(blocks)

    def pin(self, blocks: Iterable[Block]) -> None:
        """Keep blocks that are ready."""
        for block in blocks:
            self._idle.pop(block, None)
            self._num_quiet -= _is_quiet(block)
            block.num_pins += 1

    def unpin(self, blocks: Sequence[Block]) -> None:
        """Undo one `pin` of the blocks of a chain, whose last one comes last."""
        for block in reversed(blocks):
            block.num_pins -= 1
            assert block.num_pins >= 0, f"block {block.block_id} is unpinned twice"
            if block.num_pins == 0:
                self._idle[block] = None
            self._num_quiet += _is_quiet(block)

    def add_quiet(self, blocks: Iterable[Block], num_pins: int) -> None:
        """Count so many more, or fewer, of the pins of blocks as those of quiet conversations."""
        for block in blocks:
            self._num_quiet -= _is_quiet(block)
            block.num_quiet += num_pins
            self._num_quiet += _is_quiet(block)

    def has_quiet(self, blocks: Iterable[Block]) -> bool:
        """Whether only conversations that wait for their next turn have pinned some of these."""
        return any(map(_is_quiet, blocks))

    def set_ready(self, blocks: Sequence[Block]) -> None:
        """The blocks of a chain are filled on all workers."""
        for block in reversed(blocks):
            block.is_ready = True
            self._idle[block] = None

    def doom(self, blocks: Iterable[Block]) -> None:
        """Blocks that are being filled will never be ready: nobody shall wait for them."""
        for block in blocks:
            if self._blocks.get(block.key) is block:
                del self._blocks[block.key]

    def drop(self, blocks: Sequence[Block]) -> list[int]:
        """Give up blocks that are doomed; returns their ids."""
        self._num_held -= len(blocks)
        self.counts.evicted += len(blocks)
        return [block.block_id for block in blocks]

    def evict(self, num_blocks: int) -> list[int]:
        """Give up so many of the idle blocks; returns their ids."""
        gone = [self._idle.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in gone:
            del self._blocks[block.key]
        return self.drop(gone)


def _found(
    blocks: tuple[Block, ...], is_coming: bool, storable: tuple[bytes, ...], last: Found
) -> Found:
    """`last`, if it says the same; else what there is."""
    is_same = blocks is last.blocks and is_coming == last.is_coming and storable is last.storable
    return last if is_same else Found(blocks, is_coming, storable)


def _is_quiet(block: Block) -> bool:
    return 0 < block.num_pins == block.num_quiet

"""Sequences out of their slots, with all that this worker remembers of them.

Their keys and values stay in their pages, or are copied to the host's memory. What else is
remembered is small, and always goes to the host: queries and normalisers, sums of attention, when
rows are cut. Tokens and how they are sampled are told anew by the plan that lets one resume.

Shapes: L local layers, H kv heads, P pages of one sequence, w queries of a ring.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.kv.pool import PagePool
from saqqara.workers.kv.store import KVStore
from saqqara.workers.state.retained import Retained, RetainedSlot
from saqqara.workers.state.rings import QueryRings, Ring
from saqqara.workers.state.sums import MassSums, Sums
from saqqara.workers.transfer import page_locked_parts, to_device, to_host

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 25  # of keys, or values, that are gathered on a GPU before they are copied


class HostPages:
    """Copies of some pages in the host's memory; of a GPU's pages, in page-locked memory.

    A GPU copies when it gets there, and nobody waits: whoever is given the pages next writes to
    them behind the copy, on the same stream.

    Args:
        pool: whose pages.
        pages: which, int32 [P].
    """

    def __init__(self, pool: PagePool, pages: NDArray[np.int32]) -> None:
        self._chunks = [
            tuple(to_host(stored.index_select(0, ids)) for stored in (pool.k_pages, pool.v_pages))
            for ids in _chunked(pool, pages)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for chunk in self._chunks for x in chunk)

    def restore(self, pool: PagePool, pages: NDArray[np.int32]) -> None:
        """Fill as many pages, int32 [P], with what these were copied from."""
        for ids, chunk in zip(_chunked(pool, pages), self._chunks, strict=True):
            for stored, tokens in zip((pool.k_pages, pool.v_pages), chunk, strict=True):
                stored.index_copy_(0, ids, tokens.to(stored.device, non_blocking=True))


@dataclass(slots=True)
class ParkedSequence:
    """One sequence out of its slot.

    Attributes:
        kept: tokens of each row, int32 [L, H].
        pages: of its rows, one row after the other, int32 [P]; what stands where they are not
            `held` means nothing.
        held: which of them it holds in the pool, bool [P].
        copied: the others, in the same order; None where it holds all of them, or they are lost.
        seen: tokens that went into rows with a window.
        retained: when its rows are cut.
        ring: its last queries, if they are remembered.
        sums: of the attention that its tokens got, if they are remembered.
        is_lost: its pages are gone; what else is known of it other ranks count on.
    """

    kept: NDArray[np.int32]
    pages: NDArray[np.int32]
    held: NDArray[np.bool_]
    copied: HostPages | None
    seen: int
    retained: RetainedSlot
    ring: Ring | None
    sums: Sums | None
    is_lost: bool = False

    @property
    def host_bytes(self) -> int:
        """Bytes in the host's memory."""
        remembered = [] if self.ring is None else [self.ring.queries, self.ring.normalisers]
        remembered += [] if self.sums is None else [self.sums.masses]
        copied = 0 if self.copied is None else self.copied.num_bytes
        return copied + sum(x.nbytes for x in remembered if x is not None)


class ParkedSequences:
    """The sequences of one worker that left their slots, by the ids that plans give them.

    Args:
        kv: their rows lie in when they have a slot.
        retained: of the worker's slots.
        rings: the same.
        sums: the same.
    """

    def __init__(self, kv: KVStore, retained: Retained, rings: QueryRings, sums: MassSums) -> None:
        self._kv, self._retained, self._rings, self._sums = kv, retained, rings, sums
        self._parked: dict[int, ParkedSequence] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def __contains__(self, parked_id: int) -> bool:
        return parked_id in self._parked

    def __getitem__(self, parked_id: int) -> ParkedSequence:
        return self._parked[parked_id]

    @property
    def host_bytes(self) -> int:
        """Bytes in the host's memory."""
        return sum(parked.host_bytes for parked in self._parked.values())

    def pages(self) -> NDArray[np.int32]:
        """Ids of all pages that are held here, once for each sequence that holds them."""
        held = [parked.pages[parked.held] for parked in self._parked.values()]
        return np.concatenate(held) if held else np.empty(0, dtype=np.int32)

    def park(self, slot: int, parked_id: int, to_host: bool) -> None:
        """Take over all that is remembered of a slot, whose rows are empty then.

        Args:
            slot: whose prefill has ended.
            parked_id: by which it can be resumed, offloaded or dropped.
            to_host: copy its pages to the host, and give them up.
        """
        assert parked_id not in self._parked, f"{parked_id} is parked"
        kv, kept = self._kv, self._kv.kept(slot)
        pages = kv.pages_of_rows(slot)
        parked = ParkedSequence(
            kept=kept,
            pages=pages,
            held=np.ones(len(pages), dtype=np.bool_),
            copied=None,
            seen=int(kv.rings.seen[slot]),
            retained=self._retained.copy_of(slot),
            ring=self._rings.copy_of(slot),
            sums=self._sums.copy_of(slot, int(kept.max(initial=0))),
        )
        kv.table.set_kept(np.array([slot]), np.zeros_like(kept)[None])
        kv.rings.seen[slot] = 0
        self._parked[parked_id] = parked
        if to_host:
            self.offload(parked_id)

    def offload(self, parked_id: int) -> None:
        """Copy the pages of a sequence to the host; nothing to do where there is none.

        If the system gives no memory for that, its rows are lost, and it cannot be resumed here;
        its pages are free in any case.
        """
        parked = self._parked.get(parked_id)
        if parked is None or parked.is_lost:
            return
        try:
            self._offload(parked)
        except (MemoryError, RuntimeError) as error:  # which torch raises for want of memory
            logger.warning(
                "host memory: a sequence of %d pages is not kept and will be computed again; lower "
                "host_kv_gib (%s)",
                *(len(parked.pages), (str(error).splitlines() or [type(error).__name__])[0]),
            )
            self._kv.pool.release(parked.pages[parked.held])
            parked.held = np.zeros_like(parked.held)
            parked.is_lost = True

    def drop(self, parked_id: int) -> None:
        """Forget a sequence; nothing to do where there is none."""
        parked = self._parked.pop(parked_id, None)
        if parked is not None:
            self._kv.pool.release(parked.pages[parked.held])

    def resume(self, slot: int, parked_id: int, *, only_rows: bool = False) -> bool:
        """Put a sequence into an empty slot, as it was when it left its own.

        What else is remembered of it besides its rows is taken over in any case.

        Args:
            slot: that is empty.
            parked_id: of the sequence; no longer known then.
            only_rows: take over nothing else.

        Returns:
            False if the free pages do not suffice, or what it had is lost; then the rows are empty,
            and it stays parked.
        """
        parked, kv = self._parked[parked_id], self._kv
        if not only_rows:
            self._retained.restore(slot, parked.retained)
            self._rings.restore(slot, parked.ring)
            self._sums.restore(slot, parked.sums)
        num_copied = int(np.count_nonzero(~parked.held))
        if parked.is_lost or num_copied > kv.pool.num_free:
            return False
        del self._parked[parked_id]
        pages = parked.pages.copy()
        pages[~parked.held] = kv.pool.allocate(num_copied)
        if parked.copied is not None:
            parked.copied.restore(kv.pool, pages[~parked.held])
        kv.table.set_pages(kv.table.used_entries(kv.table.first_entry[slot], parked.kept), pages)
        kv.table.set_kept(np.array([slot]), parked.kept[None])
        kv.rings.seen[slot] = parked.seen
        return True

    def _offload(self, parked: ParkedSequence) -> None:
        """Copy what nobody else holds; pages that are shared stay, and are only referred to."""
        if parked.copied is not None:
            return
        pool = self._kv.pool
        is_shared = pool.refcount[parked.pages] > 1
        own = parked.pages[~is_shared]
        parked.copied = HostPages(pool, own)
        parked.held = is_shared
        pool.release(own)


def _chunked(pool: PagePool, pages: NDArray[np.int32]) -> list[Tensor]:
    """Ids of pages on their device, int64, so many at once that copies of them are small."""
    device, page_bytes = pool.k_pages.device, pool.k_pages[0].nbytes
    ids = to_device(pages.astype(np.int64), device)
    if not len(pages):
        return []
    if device.type == "cuda":
        return list(torch.split(ids, page_locked_parts(len(pages), page_bytes, CHUNK_BYTES)))
    return list(torch.split(ids, max(1, CHUNK_BYTES // page_bytes)))

"""The KV store of one worker: write after prefill, append, view, fork, free.

A page belongs to one row, a row is (slot, layer, kv head), and rows have any length. Positions
here are places in storage (0 is the first token kept), not positions in the text. Rows of layers
with a window are rings of their last tokens (`ring.py`).

Shapes: T new tokens of all sequences, N sequences, L local layers, H local kv heads, P pages,
D head dim.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.transfer import to_device

from .appends import append_plan, shared_tails
from .integrity import check_integrity
from .moves import KernelMoves, kernels_can_move
from .pool import PagePool
from .ring import Rings
from .spans import padded, spans
from .table import RowTable
from .view import AppendPlan, KVView


class KVStore:
    """Keys and values of every row of one worker, in pages.

    Layers and heads are counted from 0 within this worker. A method that finds too few free pages
    says so and changes nothing.

    Args:
        num_layers: local layers, L.
        num_heads: local kv heads, H.
        num_slots: sequences that can hold pages at once.
        num_pages: pages in the pool.
        page_tokens: tokens of one page.
        max_row_tokens: the most tokens a row can keep.
        head_dim: numbers of one key, D.
        dtype: of keys and values.
        device: where the pages live.
        mirrored: keep separate device copies of the tables; default: only where the device is not
            the host (tests set it to check the copies).
        kernels: move tokens with Triton kernels, not with torch's index operations; default: only
            on a GPU, where they run.
        mirror_entries: entries of those copies, `mirror.num_entries`; default: of all rows at full
            length.
        windows: of each layer, how many of the last tokens its rows hold; 0: all. Default: no layer
            has one.

    Raises:
        ValueError: a size that is not positive, naming it.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        num_slots: int,
        num_pages: int,
        page_tokens: int,
        max_row_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        mirrored: bool | None = None,
        kernels: bool | None = None,
        mirror_entries: int | None = None,
        windows: Sequence[int] = (),
    ) -> None:
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.page_tokens = page_tokens
        self.pool = PagePool(num_pages, page_tokens, head_dim, dtype, device)
        sizes = (num_slots, num_layers, num_heads, max_row_tokens, page_tokens)
        self.table = RowTable(*sizes, device, mirrored, mirror_entries)
        self.rings = Rings(windows or (0,) * num_layers, num_slots)
        if kernels is None:
            kernels = device.type == "cuda" and kernels_can_move(device)
        self.moves = KernelMoves(self.pool, self.table) if kernels else None
        self.k_tokens = self.pool.k_pages.view(-1, head_dim)
        self.v_tokens = self.pool.v_pages.view(-1, head_dim)
        self.holders: list[Callable[[], NDArray[np.int32]]] = []  # of pages, besides rows

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.pool.num_pages

    @property
    def pages_free(self) -> int:
        """Pages that nobody holds."""
        return self.pool.num_free

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys + values."""
        return self.pool.page_bytes

    def kept(self, slot: int) -> NDArray[np.int32]:
        """Tokens kept by each row of a slot, int32 [L, H]."""
        kept: NDArray[np.int32] = self.table.kept[slot].copy()
        return kept

    def pages_of(self, slot: int) -> int:
        """Pages that a slot holds, shared ones included."""
        return int(self.table.num_pages(self.table.kept[slot]).sum())

    # -- prefill ----------------------------------------------------------------------------

    def write(
        self,
        slot: int,
        layer: int,
        k: Tensor,
        v: Tensor,
        indices: Tensor | Sequence[Tensor] | None = None,
        num_before: int = 0,
    ) -> bool:
        """Store the selected tokens of one layer, whose rows must be empty.

        Args:
            slot: the sequence's slot.
            layer: local layer.
            k: keys of the whole prompt, [n, H, D].
            v: values, [n, H, D].
            indices: which tokens each head keeps, in order: int64 [H, keep], or one int64 tensor
                per head; None for all, or as many of the last as the layer's window has.
            num_before: in a layer with a window, the prompt has so many tokens before those.

        Returns:
            False if the pages do not suffice; then nothing was written for this layer.
        """
        table, device = self.table, self.table.device
        n, num_heads, dim = k.shape
        if layer in self.rings:
            assert indices is None, "what rows with a window keep is given"
            indices = self.prompt_ring(num_before + n, num_before)
        assert not table.kept[slot, layer].any(), f"slot {slot}, layer {layer} is not empty"
        counts = np.full(num_heads, n, dtype=np.int32) if indices is None else _counts(indices)
        assert counts.max() <= table.max_row_tokens, (counts.max(), table.max_row_tokens)
        needed = table.num_pages(counts)
        total = int(needed.sum())
        if total > self.pool.num_free:
            return False
        pages = self.pool.allocate(total)
        table.set_pages(spans(table.first_entry[slot, layer], needed), pages)
        table.set_layer_kept(np.array([slot]), layer, counts[None])
        self.rings.start(layer, slot, num_before + n)
        if self.moves is not None:
            chosen = None if indices is None else _concatenate(indices)
            heads = np.arange(num_heads)
            self.moves.fill(pages, counts, heads, np.zeros_like(heads), k, v, chosen)
            return True
        nth, head = padded(counts, needed * self.page_tokens)
        if indices is None:
            source = to_device(nth * num_heads + head, device)
        else:
            offset = np.cumsum(counts) - counts
            token = _concatenate(indices).index_select(0, to_device(offset[head] + nth, device))
            source = token * num_heads + to_device(head, device)
        self.fill_pages(pages, k.reshape(-1, dim), v.reshape(-1, dim), source)
        return True

    def prompt_ring(self, num_tokens: int, num_before: int = 0) -> Tensor | None:
        """Which tokens of a prompt rows with a window keep, by place, [H, W]; None for all.

        They are counted from the token after `num_before`, which is one of them or before them.
        """
        order = self.rings.prompt_order(num_tokens)
        if order is None:
            assert num_before == 0, f"the window reaches to the first of {num_tokens} tokens"
            return None
        assert order.min() >= num_before, f"the first {num_before} of {num_tokens} are kept"
        return to_device(order - num_before, self.table.device).expand(self.num_heads, -1)

    # -- decode and extend ------------------------------------------------------------------

    def begin_append(
        self, slots: NDArray[np.int64], num_new: NDArray[np.int64]
    ) -> AppendPlan | None:
        """Reserve room for new tokens in every layer and head of some slots; lengths grow here.

        A page that a row shares with another is copied before the row's tokens go into it.

        Args:
            slots: different slots, int64 [N].
            num_new: new tokens of each, at least 1, int64 [N].

        Returns:
            The plan for `append` and the views, or None, with nothing changed, if the pages do not
            suffice.
        """
        grown = self._grow(slots, num_new)
        if grown is None:
            return None
        return append_plan(self.table, self.rings, slots, num_new, *grown)

    def grow(self, slots: NDArray[np.int64]) -> bool:
        """Reserve room for one new token of each slot, for a step that counts it on the device.

        Lengths grow on the host alone: the step does the same to the device's.

        Args:
            slots: different slots, int64 [N].

        Returns:
            False, with nothing changed, if the pages do not suffice.
        """
        return self._grow(slots, np.ones(len(slots), dtype=np.int64), on_device=False) is not None

    def _grow(
        self, slots: NDArray[np.int64], num_new: NDArray[np.int64], on_device: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]] | None:
        """Lengthen rows: their first table entries, and lengths before and after, [N, L, H]."""
        table, pool = self.table, self.pool
        assert len(set(slots.tolist())) == len(slots), f"a slot appears twice: {slots}"
        assert num_new.min() >= 1, num_new
        before = table.kept[slots]  # [N, L, H]
        after = before + num_new.astype(np.int32)[:, None, None]
        if self.rings.window:
            after = self.rings.capped(after)
        assert after.max() <= table.max_row_tokens, (after.max(), table.max_row_tokens)
        first = table.first_entry[slots]
        used = table.num_pages(before)
        needed = table.num_pages(after) - used
        num_needed = int(needed.sum())
        tails = None
        if pool.any_shared:
            tails = shared_tails(table, pool, self.rings, slots, num_new, before)
        if num_needed + (0 if tails is None else len(tails)) > pool.num_free:
            return None
        if tails is not None:
            self._unshare(tails)
        if num_needed:
            if num_needed == np.count_nonzero(needed):
                chosen = needed != 0
                entries = first[chosen] + used[chosen]
            else:
                entries = spans((first + used).reshape(-1), needed.reshape(-1))
            pages = pool.allocate(num_needed)
            table.set_pages(entries, pages)
            pool.clear(to_device(pages.astype(np.int64), table.device))
        if on_device:
            table.set_kept(slots, after)
        else:
            assert table.mirror is not None, "host and device share the lengths"
            table.kept[slots] = after
        if self.rings.window:
            self.rings.seen[slots] += num_new
        return first, before, after

    def _unshare(self, entries: NDArray[np.int64]) -> None:
        """Give these page table entries copies of their pages."""
        device = self.table.device
        old = self.table.flat_pages[entries]
        new = self.pool.allocate(len(old))
        source, target = to_device(old, device), to_device(new.astype(np.int64), device)
        for pages in (self.pool.k_pages, self.pool.v_pages):
            pages.index_copy_(0, target, pages.index_select(0, source))
        self.table.set_pages(entries, new)
        self.pool.release(old)

    def append(self, plan: AppendPlan, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new keys and values of one layer, [T, H, D] in the order of the plan."""
        refs, dim = plan.refs[layer], k.shape[-1]
        if plan.survivors is not None and layer in self.rings:
            refs, k, v = (x.index_select(0, plan.survivors) for x in (refs, k, v))
        if self.moves is not None:
            self.moves.append(k, v, refs)
            return
        refs = refs.view(-1)
        self.k_tokens.index_copy_(0, refs, k.reshape(-1, dim))
        self.v_tokens.index_copy_(0, refs, v.reshape(-1, dim))

    def view(
        self,
        plan_or_slots: AppendPlan | NDArray[np.int64],
        layer: int,
        include_new: bool = True,
    ) -> KVView:
        """What one layer keeps of some sequences.

        Args:
            plan_or_slots: a plan, whose lengths are those of its `begin_append`; or slots, int64
                [N], as they are now.
            layer: local layer.
            include_new: with a plan, whether lengths include its new tokens.
        """
        if isinstance(plan_or_slots, AppendPlan):
            plan, slots = plan_or_slots, plan_or_slots.device_slots
            lengths, max_length = plan.lengths[layer], plan.max_lengths[layer]
            if not include_new:
                before = np.ascontiguousarray(plan.before[layer])  # a step of rows is transposed
                lengths, max_length = to_device(before, self.table.device), int(before.max())
        else:
            slots = to_device(plan_or_slots, self.table.device)
            lengths = self.table.device_kept[:, layer].index_select(0, slots)
            max_length = int(self.table.kept[plan_or_slots, layer].max(initial=0))
        max_pages = -(-max_length // self.page_tokens)
        return KVView(
            k_pages=self.pool.k_pages,
            v_pages=self.pool.v_pages,
            page_table=self.table.layer_pages(slots, layer, max_pages),
            lengths=lengths,
            max_length=max_length,
            page_tokens=self.page_tokens,
        )

    def decode_view(self, plan: AppendPlan, layer: int) -> KVView:
        """The rows of a plan with their new tokens."""
        return self.view(plan, layer, include_new=True)

    def extend_view(self, plan: AppendPlan, layer: int) -> KVView:
        """The rows of a plan as they were before its new tokens."""
        return self.view(plan, layer, include_new=False)

    def read(self, slot: int, layer: int, head: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values that one row keeps, [kept, D] each, the newest last."""
        kept = int(self.table.kept[slot, layer, head])
        row = np.array([slot]), layer, np.array([head])
        pages = self.table.row_pages(*row, -(-kept // self.page_tokens))[0]
        k, v = (
            x.index_select(0, pages).view(-1, x.shape[-1])[:kept]
            for x in (self.pool.k_pages, self.pool.v_pages)
        )
        if layer in self.rings and kept:
            places, _ = self.rings.in_order(self.rings.seen[[slot]])
            at = to_device(places, self.table.device)
            return k.index_select(0, at), v.index_select(0, at)
        return k, v

    # -- sharing, release -------------------------------------------------------------------

    def fork(self, source: int, target: int) -> None:
        """Let an empty slot share all pages of another; either copies a page before it appends.

        The way to n > 1 samples of a prompt and to reused prefixes, which no plan asks for yet.
        """
        table = self.table
        assert not table.kept[target].any(), f"slot {target} is not empty"
        table.copy_slot(source, target)
        self.rings.seen[target] = self.rings.seen[source]
        self.pool.share(self.pages_of_rows(source))

    def free(self, slot: int) -> None:
        """Empty all rows of a slot."""
        self.pool.release(self.pages_of_rows(slot))
        zeros = np.zeros((1, self.num_layers, self.num_heads), dtype=np.int32)
        self.table.set_kept(np.array([slot]), zeros)
        self.rings.seen[slot] = 0

    def pages_of_rows(self, slot: int) -> NDArray[np.int32]:
        """Ids of all pages that a slot holds, one row after the other."""
        table = self.table
        return table.flat_pages[table.used_entries(table.first_entry[slot], table.kept[slot])]

    def fill_pages(
        self, pages: NDArray[np.int32], k: Tensor, v: Tensor, source: Tensor | None = None
    ) -> None:
        """Fill pages with tokens, in order: those of k and v [tokens, D], or their `source`."""
        target = to_device(pages.astype(np.int64), self.table.device)
        for stored, tokens in ((self.pool.k_pages, k), (self.pool.v_pages, v)):
            rows = tokens if source is None else tokens.index_select(0, source)
            stored.index_copy_(0, target, rows.view(-1, *stored.shape[1:]))

    def check_integrity(self) -> None:
        """Prove that every page is free, or owned by as many rows as its reference count says.

        Raises:
            AssertionError: what does not match.
        """
        elsewhere = [np.empty(0, dtype=np.int32), *(pages() for pages in self.holders)]
        check_integrity(self.table, self.pool, self.rings, np.concatenate(elsewhere))


def _counts(indices: Tensor | Sequence[Tensor]) -> NDArray[np.int32]:
    """How many tokens each head keeps, int32 [H]."""
    return np.array([len(head) for head in indices], dtype=np.int32)


def _concatenate(indices: Tensor | Sequence[Tensor]) -> Tensor:
    return indices.reshape(-1) if isinstance(indices, Tensor) else torch.cat(list(indices))

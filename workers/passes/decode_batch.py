"""The decode part of a plan on one worker: whose pages the new tokens go to, and who attends how.

Shapes: T fed tokens in plan order, E hidden size, Hq local query heads, H local kv heads, D head
dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.kv.rows import rings_with_new
from saqqara.workers.kv.store import KVStore
from saqqara.workers.kv.view import AppendPlan, KVView
from saqqara.workers.models.layer import QKV, Layer, Places
from saqqara.workers.plan import DecodeItem
from saqqara.workers.shard import Shard
from saqqara.workers.state.rings import QueryRings, RingWrites
from saqqara.workers.state.sums import MassSums
from saqqara.workers.transfer import to_device


@dataclass(frozen=True)
class Company:
    """Decoding sequences that attend together, because the same is wanted of their attention.

    Attributes:
        slots: theirs, int64 [C].
        rows: which of the decoding sequences they are, int64 [C]; None for all.
        sums: whether the attention that tokens get is added to their sums.
        places: where their normalisers are remembered, int64 [C]; None if they are not.
    """

    slots: NDArray[np.int64]
    rows: Tensor | None
    sums: bool = False
    places: Tensor | None = None


@dataclass(frozen=True)
class DecodeBatch:
    """Fed tokens in the order of the plan, and the pages reserved for them.

    Sequences that feed one token (`num_single` of them) decode, at `single_positions`; those that
    feed several extend.
    In `append` the single ones come first. `rows` says which fed tokens those are, in that order;
    None where that is the plan's own order and nobody is left out. Tokens of refused slots are in
    the batch, because other ranks count on its size, but attend to nothing and are not stored.
    `rings` says which queries are remembered for cuts; None where no sequence needs any.
    `companies` has the decoding sequences apart by what is wanted of their attention; none where
    that is the output alone.
    """

    positions: NDArray[np.int64]
    append: AppendPlan | None
    rows: Tensor | None
    num_single: int
    cu: CuSeqlens | None
    single_positions: NDArray[np.int64]
    rings: RingWrites | None = None
    companies: tuple[Company, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Fed tokens, T."""
        return len(self.positions)

    @classmethod
    def reserve(
        cls, kv: KVStore, items: Sequence[DecodeItem], fitting: Sequence[DecodeItem]
    ) -> "DecodeBatch | None":
        """Reserve pages for the `fitting` items; None, with nothing changed, if they do not fit."""
        device = kv.table.device
        positions = np.concatenate(
            [np.arange(i.position, i.position + i.num_tokens) for i in items]
        )
        if not fitting:
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            return cls(positions, None, nothing, 0, None, positions[:0])
        single = [item for item in fitting if item.num_tokens == 1]
        several = [item for item in fitting if item.num_tokens > 1]
        slots = np.array([item.slot for item in single + several], dtype=np.int64)
        counts = np.array([item.num_tokens for item in single + several], dtype=np.int64)
        append = kv.begin_append(slots, counts)
        if append is None:
            return None
        rows = cu = None
        if several or len(fitting) < len(items):
            rows = to_device(rows_of(items, single + several), device)
        if several:
            cu = CuSeqlens.of([item.num_tokens for item in several], device)
        at = np.array([item.position for item in single], dtype=np.int64)
        return cls(positions, append, rows, len(single), cu, at)

    def keep_company(self, sums: MassSums, rings: QueryRings) -> "DecodeBatch":
        """The same batch, its sequences apart by what else must be noted of their attention."""
        if self.append is None:
            return self
        slots, device = self.append.slots, self.append.device_slots.device
        has_sums, has_lse = sums.has(slots), rings.normalised(slots)
        noted = has_sums | has_lse
        assert not noted[self.num_single :].any(), "attention is noted token by token"
        if not noted.any():
            return self
        companies = []
        for chosen in (has_sums, has_lse, ~noted):
            among = np.flatnonzero(chosen[: self.num_single])
            if len(among) == 0:
                continue
            rows = None if len(among) == self.num_single else to_device(among, device)
            places = None
            if chosen is has_lse:
                places = rings.places(slots[among], self.single_positions[among])
            companies.append(Company(slots[among], rows, chosen is has_sums, places))
        return replace(self, companies=tuple(companies))

    def attend(
        self, shard: Shard, index: int, layer: Layer, hidden_TE: Tensor, places: Places
    ) -> Tensor:
        """Project, store the new keys and values, and attend, [T, Hq, D].

        `index` counts this worker's layers from 0. Rows of refused slots come out as zeros.
        """
        timed, kv = shard.clock.span, shard.kv
        if self.rows is None:
            assert self.append is not None
            with timed("project"):
                refs = self.append.refs[index]
                q = layer.project_append(hidden_TE, places, kv.k_tokens, kv.v_tokens, refs)
                self._remember(shard, index, q)
            with timed("attention"):
                return self._decode(shard, index, q, kv.decode_view(self.append, index))
        with timed("project"):
            qkv = layer.project(hidden_TE, places)
            self._remember(shard, index, qkv.q)
        attended = torch.zeros_like(qkv.q)
        if self.append is not None:
            with timed("attention"):
                attended[self.rows] = self._attend_rows(shard, index, qkv)
        return attended

    def _remember(self, shard: Shard, index: int, q: Tensor) -> None:
        if self.rings is not None:
            shard.rings.append(self.rings, index, q)

    def _attend_rows(self, shard: Shard, index: int, qkv: QKV) -> Tensor:
        """Store and attend for the sequences that are fed, the single ones first."""
        assert self.append is not None
        q, k, v = (x[self.rows] for x in qkv)
        kv, n = shard.kv, self.num_single
        parts = []
        if self.cu is not None:  # before new tokens take the places of old ones in rings
            parts.append(self._extend(shard, index, q[n:], k[n:], v[n:], self.cu))
        kv.append(self.append, index, k, v)
        if n:
            view = _narrow(kv.decode_view(self.append, index), slice(0, n))
            parts.insert(0, self._decode(shard, index, q[:n], view))
        return torch.cat(parts)

    def _extend(
        self, shard: Shard, index: int, q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens
    ) -> Tensor:
        """Attention of the sequences that feed several tokens, whose rows do not have them yet."""
        assert self.append is not None
        kv, part, first = shard.kv, shard.part, self.num_single
        if index in kv.rings:
            k, v, lengths = rings_with_new(kv, self.append, index, first, k, v)
            cu_k = CuSeqlens.of(lengths, q.device)
            return part.backend.prefill(q, k, v, cu, cu_k, part.scale, kv.rings.window)[0]
        view = _narrow(kv.extend_view(self.append, index), slice(first, None))
        return part.backend.extend(q, k, v, cu, view, part.scale)

    def _decode(self, shard: Shard, index: int, q: Tensor, view: KVView) -> Tensor:
        """Decode the single tokens, company by company.

        So nobody's output depends, not even in its rounding, on who else is in the batch.
        """
        if not self.companies or index in shard.kv.rings:  # which nothing is cut from
            return shard.part.backend.decode(q, view, shard.part.scale)
        if self.companies[0].rows is None:
            return _attended(shard, index, q, view, self.companies[0])
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for company in self.companies:
            assert company.rows is not None
            longest = int(shard.kv.table.kept[company.slots, index].max())
            chosen = _pick(view, company.rows, longest)
            out[company.rows] = _attended(shard, index, q[company.rows], chosen, company)
        return out


def rows_of(items: Sequence[DecodeItem], chosen: Sequence[DecodeItem]) -> NDArray[np.int64]:
    """Which of the tokens fed by all items are those of the chosen ones, in their order."""
    starts = np.cumsum([0] + [item.num_tokens for item in items])
    first = {item.slot: int(start) for item, start in zip(items, starts, strict=False)}
    return np.concatenate(
        [np.arange(first[item.slot], first[item.slot] + item.num_tokens) for item in chosen]
    )


def _attended(shard: Shard, index: int, q: Tensor, view: KVView, company: Company) -> Tensor:
    """Attention of one company; what is wanted besides goes to where it is kept."""
    backend, scale = shard.part.backend, shard.part.scale
    if company.sums:
        attended, masses = backend.decode_and_mass(q, view, scale)
        shard.sums.add(company.slots, index, masses)
        return attended
    if company.places is not None:
        attended, lse = backend.decode_and_lse(q, view, scale)
        shard.rings.normalise(company.places, index, lse)
        return attended
    return backend.decode(q, view, scale)


def _pick(view: KVView, sequences: Tensor, max_length: int) -> KVView:
    """Some sequences of a view, none of whose rows is longer than `max_length`."""
    max_pages = -(-max_length // view.page_tokens)
    return replace(
        view,
        page_table=view.page_table[sequences, :, :max_pages].contiguous(),
        lengths=view.lengths[sequences],
        max_length=max_length,
    )


def _narrow(view: KVView, sequences: slice) -> KVView:
    return replace(view, page_table=view.page_table[sequences], lengths=view.lengths[sequences])

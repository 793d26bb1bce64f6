"""The decode part of a plan on one worker: whose pages the new tokens go to, and who attends how.

Shapes: T fed tokens in plan order, Hq local query heads, H local kv heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention.base import AttentionBackend, CuSeqlens
from .kv.store import AppendPlan, KVStore, KVView
from .plan import DecodeItem


@dataclass(frozen=True)
class DecodeBatch:
    """Fed tokens in the order of the plan, and the pages reserved for them.

    Sequences that feed one token (`num_single` of them) decode; those that feed several extend.
    In `append` the single ones come first. `rows` says which fed tokens those are, in that order;
    None where that is the plan's own order and nobody is left out. Tokens of refused slots are in
    the batch, because other ranks count on its size, but attend to nothing and are not stored.
    """

    positions: NDArray[np.int64]
    append: AppendPlan | None
    rows: Tensor | None
    num_single: int
    cu: CuSeqlens | None

    @property
    def num_tokens(self) -> int:
        """Fed tokens, T."""
        return len(self.positions)

    @classmethod
    def reserve(
        cls,
        kv: KVStore,
        items: Sequence[DecodeItem],
        fitting: Sequence[DecodeItem],
        device: torch.device,
    ) -> "DecodeBatch | None":
        """Reserve pages for the `fitting` items; None, with nothing changed, if they do not fit."""
        positions = np.concatenate(
            [np.arange(i.position, i.position + i.num_tokens) for i in items]
        )
        if not fitting:
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            return cls(positions, None, nothing, 0, None)
        single = [item for item in fitting if item.num_tokens == 1]
        several = [item for item in fitting if item.num_tokens > 1]
        slots = np.array([item.slot for item in single + several], dtype=np.int64)
        counts = np.array([item.num_tokens for item in single + several], dtype=np.int64)
        append = kv.begin_append(slots, counts)
        if append is None:
            return None
        rows = None
        if several or len(fitting) < len(items):
            starts = np.cumsum([0] + [item.num_tokens for item in items])
            first = {item.slot: int(start) for item, start in zip(items, starts, strict=False)}
            order = [
                np.arange(first[item.slot], first[item.slot] + item.num_tokens)
                for item in single + several
            ]
            rows = torch.from_numpy(np.concatenate(order)).to(device)
        cu = CuSeqlens.of([item.num_tokens for item in several], device) if several else None
        return cls(positions, append, rows, len(single), cu)

    def attend(
        self,
        kv: KVStore,
        backend: AttentionBackend,
        layer: int,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        scale: float,
    ) -> Tensor:
        """Store the new keys and values [T, H, D] and attend with the queries, [T, Hq, D].

        `layer` counts this worker's layers from 0. Rows of refused slots come out as zeros.
        """
        if self.append is None:
            return torch.zeros_like(q_THD)
        if self.rows is None:
            kv.append(self.append, layer, k_THD, v_THD)
            return _decode(backend, q_THD, kv.decode_view(self.append, layer), scale)
        q, k, v = q_THD[self.rows], k_THD[self.rows], v_THD[self.rows]
        kv.append(self.append, layer, k, v)
        n = self.num_single
        parts = []
        if n:
            view = _narrow(kv.decode_view(self.append, layer), slice(0, n))
            parts.append(_decode(backend, q[:n], view, scale))
        if self.cu is not None:
            view = _narrow(kv.extend_view(self.append, layer), slice(n, None))
            parts.append(backend.extend(q[n:], k[n:], v[n:], self.cu, view, scale))
        attended = torch.zeros_like(q_THD)
        attended[self.rows] = torch.cat(parts)
        return attended


def _decode(backend: AttentionBackend, q: Tensor, view: KVView, scale: float) -> Tensor:
    attended = backend.decode(q, view, scale)
    assert isinstance(attended, Tensor), "no mass was asked for"
    return attended


def _narrow(view: KVView, sequences: slice) -> KVView:
    return replace(view, page_table=view.page_table[sequences], lengths=view.lengths[sequences])

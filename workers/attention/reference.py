"""The oracle: attention in float32, one query and one head at a time, as one would write it down.

It shares no code with the other backends and is as slow as it looks.

Shapes: T packed tokens, N sequences, Hq local query heads, H local kv heads, D head dim.
"""

import torch
from torch import Tensor

from saqqara.workers.kv.view import KVView

from .base import CuSeqlens


class ReferenceAttention:
    """Every number by its definition. Arguments and results are those of `AttentionBackend`."""

    name = "reference"

    def __init__(self, softcap: float = 0.0) -> None:
        self.softcap = softcap

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: CuSeqlens,
        cu_k: CuSeqlens,
        scale: float,
        window: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of the last queries of each sequence over its keys."""
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], device=q.device)
        group = q.shape[1] // k.shape[1]
        for n in range(len(cu_q.host) - 1):
            first, last = cu_q.host[n], cu_q.host[n + 1]
            first_key, last_key = cu_k.host[n], cu_k.host[n + 1]
            for t in range(first, last):
                own = last_key - (last - t)
                seen = slice(max(first_key, own + 1 - window) if window else first_key, own + 1)
                for head in range(q.shape[1]):
                    keys, values = k[seen, head // group], v[seen, head // group]
                    out[t, head], _ = self._attend(q[t, head], keys, values, scale)
                    lse[t, head] = torch.logsumexp(self._scores(q[t, head], keys, scale), dim=0)
        return out, lse

    def decode(self, q: Tensor, view: KVView, scale: float) -> Tensor:
        """Attention of one query per sequence over what its rows keep."""
        return self.decode_and_mass(q, view, scale)[0]

    def decode_and_lse(self, q: Tensor, view: KVView, scale: float) -> tuple[Tensor, Tensor]:
        """`decode`, and the normaliser of each query's softmax."""
        group = q.shape[1] // view.lengths.shape[1]
        lse = torch.empty(q.shape[:2], device=q.device)
        for n in range(q.shape[0]):
            for head in range(q.shape[1]):
                k, _ = _row(view, n, head // group)
                lse[n, head] = torch.logsumexp(self._scores(q[n, head], k, scale), dim=0)
        return self.decode(q, view, scale), lse

    def decode_and_mass(self, q: Tensor, view: KVView, scale: float) -> tuple[Tensor, Tensor]:
        """`decode`, and the attention that every kept token got."""
        num_sequences, num_heads = view.lengths.shape
        group = q.shape[1] // num_heads
        out = torch.zeros_like(q)
        mass = torch.zeros(num_sequences, num_heads, view.max_length, device=q.device)
        for n in range(num_sequences):
            for head in range(q.shape[1]):
                k, v = _row(view, n, head // group)
                out[n, head], weights = self._attend(q[n, head], k, v, scale)
                mass[n, head // group, : len(k)] += weights
        return out, mass

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, view: KVView, scale: float
    ) -> Tensor:
        """Attention of new tokens over what their rows keep, then over the new ones up to each."""
        out = torch.empty_like(q)
        group = q.shape[1] // k.shape[1]
        for n in range(len(cu.host) - 1):
            first, last = cu.host[n], cu.host[n + 1]
            for head in range(q.shape[1]):
                kept_k, kept_v = _row(view, n, head // group)
                for t in range(first, last):
                    keys = torch.cat([kept_k, k[first : t + 1, head // group]])
                    values = torch.cat([kept_v, v[first : t + 1, head // group]])
                    out[t, head], _ = self._attend(q[t, head], keys, values, scale)
        return out

    def mass(
        self,
        q_window: Tensor,
        k: Tensor,
        scale: float,
        query_weights: Tensor | None = None,
        lse: Tensor | None = None,
        num_columns: int | None = None,
    ) -> Tensor:
        """Attention that each key gets from the last queries, summed over them and the group."""
        num_queries, num_query_heads, _ = q_window.shape
        num_keys, num_heads, _ = k.shape
        mass = torch.zeros(num_heads, num_keys, device=k.device)
        for i in range(num_queries):
            seen = num_keys - num_queries + i + 1
            for head in range(num_query_heads):
                kv_head = head // (num_query_heads // num_heads)
                keys = k[:seen, kv_head]
                if lse is None:
                    _, weights = self._attend(q_window[i, head], keys, keys, scale)
                else:
                    weights = torch.exp(self._scores(q_window[i, head], keys, scale) - lse[i, head])
                mass[kv_head, :seen] += (
                    weights if query_weights is None else query_weights[i] * weights
                )
        return mass[:, :num_columns]

    def normalisers(self, q_window: Tensor, k: Tensor, scale: float) -> Tensor:
        """The normalisers of the last queries of one sequence."""
        num_queries, group = len(q_window), q_window.shape[1] // k.shape[1]
        lse = torch.empty(q_window.shape[:2], device=k.device)
        for i in range(num_queries):
            for head in range(q_window.shape[1]):
                keys = k[: len(k) - num_queries + i + 1, head // group]
                lse[i, head] = torch.logsumexp(self._scores(q_window[i, head], keys, scale), dim=0)
        return lse

    def _scores(self, q: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Scores of one query [D] over keys [m, D], float32 [m]."""
        scores = (keys.float() * q.float()).sum(dim=-1) * scale
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """One query [D] over keys and values [m, D]: output [D] and weights [m], float32."""
        if len(keys) == 0:
            return torch.zeros_like(q, dtype=torch.float32), torch.zeros(0, device=q.device)
        scores = self._scores(q, keys, scale)
        exponentials = torch.exp(scores - scores.max())
        weights = exponentials / exponentials.sum()
        return (weights[:, None] * values.float()).sum(dim=0), weights


def _row(view: KVView, n: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values [length, D] of one row, token by token."""
    keys, values = [], []
    for t in range(int(view.lengths[n, head])):
        page = int(view.page_table[n, head, t // view.page_tokens])
        keys.append(view.k_pages[page, t % view.page_tokens])
        values.append(view.v_pages[page, t % view.page_tokens])
    if not keys:
        nothing = view.k_pages.new_empty(0, view.k_pages.shape[-1])
        return nothing, nothing
    return torch.stack(keys), torch.stack(values)

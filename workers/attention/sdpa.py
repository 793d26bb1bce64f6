"""Attention in batched torch operations, for any device.

Queries of one kv head are handled together, so that keys and values are read once per kv head and
never repeated in memory. Work is cut into tiles whose scores fit into the cache.

Shapes: T packed tokens, N sequences, R rows (one kv head of one sequence), M queries of a row,
S keys of a row, Hq local query heads, H local kv heads, G = Hq / H query heads per kv head,
D head dim.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from saqqara.workers.kv.view import KVView

from .base import CuSeqlens
from .tiles import (
    CPU_TILING,
    GPU_TILING,
    Tiling,
    Workspace,
    attend,
    gather,
    group_rows,
    hide_later,
    hide_padding,
    scaled_scores,
    softmax,
    tile_dtype,
    weighted_values,
)


class TorchAttention:
    """Torch operations only. Arguments and results are those of `AttentionBackend`.

    Scores are matrix products in the dtype of the queries (accumulated in float32), softmax is
    computed in float32. On a CPU without fast arithmetic of that dtype, tiles are computed in
    float32.

    Args:
        tiling: sizes of the pieces of work; default: those measured for the device.
        softcap: of the scores; 0: they have none.
    """

    name = "torch"

    def __init__(self, tiling: Tiling | None = None, softcap: float = 0.0) -> None:
        self.softcap = softcap
        self._tiling = tiling
        self._workspaces: dict[torch.device, Workspace] = {}

    def _workspace(self, device: torch.device) -> Workspace:
        if device not in self._workspaces:
            tiling = self._tiling or (CPU_TILING if device.type == "cpu" else GPU_TILING)
            self._workspaces[device] = Workspace(tiling, device, self.softcap)
        return self._workspaces[device]

    # -- fresh keys -------------------------------------------------------------------------

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: CuSeqlens,
        cu_k: CuSeqlens,
        scale: float,
        window: int = 0,
    ) -> tuple[Tensor, None]:
        """Causal attention of the last queries of each sequence over its keys."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for n in range(len(cu_q.host) - 1):
            queries = slice(cu_q.host[n], cu_q.host[n + 1])
            keys = slice(cu_k.host[n], cu_k.host[n + 1])
            of_one = (q[queries], k[keys], v[keys])
            self._prefill_one(*of_one, scale, out[queries], window)
        return out, None

    def _prefill_one(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, window: int
    ) -> None:
        """One sequence: q and out [M, Hq, D], k and v [n, H, D]."""
        num_queries, num_query_heads, dim = q.shape
        num_keys, num_heads, _ = k.shape
        assert num_queries <= num_keys, f"{num_queries} queries of {num_keys} tokens"
        tiled = q.device.type == "cpu" and tile_dtype(q.dtype, q.device) == torch.bfloat16
        window = 0 if num_keys <= window else window
        if num_queries == num_keys and not (tiled or window or self.softcap):
            q_HMD, k_HSD, v_HSD = (x.transpose(0, 1) for x in (q, k, v))
            grouped = num_query_heads != num_heads
            attended = F.scaled_dot_product_attention(
                q_HMD[None],
                k_HSD[None],
                v_HSD[None],
                is_causal=True,
                scale=scale,
                enable_gqa=grouped,
            )
            out.copy_(attended[0].transpose(0, 1))
            return
        shape = (num_queries, num_heads, num_query_heads // num_heads, dim)
        q_HMGD, out_HMGD = (x.view(shape).transpose(0, 1) for x in (q, out))
        work = self._workspace(q.device)
        k_HSD, v_HSD = k.transpose(0, 1), v.transpose(0, 1)
        out_HMGD.copy_(attend(q_HMGD, k_HSD, v_HSD, scale, work, window=window))

    def mass(
        self,
        q_window: Tensor,
        k: Tensor,
        scale: float,
        query_weights: Tensor | None = None,
        lse: Tensor | None = None,
        num_columns: int | None = None,
    ) -> Tensor:
        """Attention that each key gets from the last queries, summed over them and the group.

        In float32 throughout: what is kept is decided by these numbers. The softmax of whole rows
        has no use for `lse`.
        """
        num_queries, num_query_heads, dim = q_window.shape
        num_keys, num_heads, _ = k.shape
        group = num_query_heads // num_heads
        if query_weights is None:
            query_weights = torch.ones(num_queries, device=k.device)
        weights = query_weights.float().repeat_interleave(group)
        mass = torch.zeros(num_heads, num_keys, device=k.device)
        work = self._workspace(k.device)
        block = work.tiling.queries(4 * group * num_keys)
        for head in range(num_heads):
            keys = work.take("keys", (num_keys, dim), torch.float32).copy_(k[:, head])
            for start in range(0, num_queries, block):
                stop = min(start + block, num_queries)
                seen = num_keys - num_queries + stop
                queries = q_window[start:stop, head * group : (head + 1) * group].float()
                scores = scaled_scores(queries.reshape(1, -1, dim), keys[None, :seen], scale, work)
                hide_later(scores, stop - start, seen - (stop - start))
                mass[head, :seen] += weights[start * group : stop * group] @ softmax(scores)[0]
        return mass[:, :num_columns]

    def normalisers(self, q_window: Tensor, k: Tensor, scale: float) -> Tensor:
        """The normalisers of the last queries of one sequence, in float32 throughout as `mass`."""
        num_queries, num_query_heads, dim = q_window.shape
        num_keys, num_heads, _ = k.shape
        group = num_query_heads // num_heads
        lse = torch.empty(num_queries, num_query_heads, device=k.device)
        work = self._workspace(k.device)
        block = work.tiling.queries(4 * group * num_keys)
        for head in range(num_heads):
            keys = work.take("keys", (num_keys, dim), torch.float32).copy_(k[:, head])
            heads = slice(head * group, (head + 1) * group)
            for start in range(0, num_queries, block):
                stop = min(start + block, num_queries)
                seen = num_keys - num_queries + stop
                queries = q_window[start:stop, heads].float().reshape(1, -1, dim)
                scores = scaled_scores(queries, keys[None, :seen], scale, work)
                hide_later(scores, stop - start, seen - (stop - start))
                lse[start:stop, heads] = scores[0].logsumexp(dim=-1).view(-1, group)
        return lse

    # -- pages ------------------------------------------------------------------------------

    def decode(self, q: Tensor, view: KVView, scale: float) -> Tensor:
        """Attention of one query per sequence over what its rows keep, like lengths together."""
        return self._decode(q, view, scale)

    def decode_and_lse(self, q: Tensor, view: KVView, scale: float) -> tuple[Tensor, Tensor]:
        """`decode`, and the normaliser of each query's softmax."""
        lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
        lse_RG = lse.view(view.lengths.numel(), -1)
        return self._decode(q, view, scale, lse_RG=lse_RG), lse

    def decode_and_mass(self, q: Tensor, view: KVView, scale: float) -> tuple[Tensor, Tensor]:
        """`decode`, and the attention that every kept token got."""
        mass_NHS = torch.zeros(*view.lengths.shape, view.max_length, device=q.device)
        return self._decode(q, view, scale, mass_NHS.flatten(0, 1)), mass_NHS

    def _decode(
        self,
        q: Tensor,
        view: KVView,
        scale: float,
        mass_RS: Tensor | None = None,
        lse_RG: Tensor | None = None,
    ) -> Tensor:
        """Attention of one query per sequence.

        Writes what each token got into `mass_RS`, and the normalisers into `lse_RG`.
        """
        num_sequences, num_heads = view.lengths.shape
        num_rows, dim = num_sequences * num_heads, q.shape[-1]
        dtype, work = tile_dtype(q.dtype, q.device), self._workspace(q.device)
        q_RGD = q.reshape(num_rows, -1, dim)
        out_RGD = torch.zeros(q_RGD.shape, dtype=q.dtype, device=q.device)
        lengths = view.lengths.reshape(-1).cpu().numpy()
        for chosen in group_rows(lengths, dim * q.element_size(), work.tiling):
            if lengths[chosen[0]] == 0:
                continue
            rows = torch.from_numpy(chosen).to(q.device)
            k_RSD, v_RSD = gather(view, rows, lengths[chosen], work)
            k_RSD = work.packed("tile keys", k_RSD, dtype)
            v_RSD = work.packed("tile values", v_RSD, dtype)
            queries = q_RGD.index_select(0, rows).to(dtype)
            scores = scaled_scores(queries, k_RSD, scale, work)
            hide_padding(scores, lengths[chosen])
            if lse_RG is not None:
                lse_RG[rows] = scores.float().logsumexp(dim=-1)
            if mass_RS is not None:
                probs = torch.softmax(scores, dim=-1, dtype=torch.float32)
                width = min(probs.shape[-1], view.max_length)
                mass_RS[rows, :width] = probs[..., :width].sum(dim=1)
                scores.copy_(probs)
            else:
                scores = softmax(scores)
            out_RGD[rows] = weighted_values(scores, v_RSD).to(q.dtype)
        return out_RGD.view(q.shape)

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, view: KVView, scale: float
    ) -> Tensor:
        """Attention of new tokens over what their rows keep, then over the new ones up to each."""
        num_heads, dim = k.shape[1:]
        group = q.shape[1] // num_heads
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        q_THGD, out_THGD = (x.view(len(q), num_heads, group, dim) for x in (q, out))
        lengths = view.lengths.reshape(-1).cpu().numpy()
        num_new, starts = np.array(cu.lengths), np.array(cu.host[:-1])
        work = self._workspace(q.device)
        tiling, itemsize = work.tiling, k.element_size()
        for count in np.unique(num_new[num_new > 0]).tolist():
            sequences = np.flatnonzero(num_new == count)
            all_rows = (sequences[:, None] * num_heads + np.arange(num_heads)).reshape(-1)
            # Rows share a tile only while the scores of all their queries fit into it.
            score_bytes = count * group * itemsize * tiling.gather_bytes // tiling.score_bytes
            token_bytes = max(dim * itemsize, score_bytes)
            for chunk in group_rows(lengths[all_rows], token_bytes, tiling, num_new=count):
                chosen = all_rows[chunk]
                sequence, head = np.divmod(chosen, num_heads)
                tokens = starts[sequence][:, None] + np.arange(count)
                rows, token_RM, head_R1 = (
                    torch.from_numpy(x).to(q.device) for x in (chosen, tokens, head[:, None])
                )
                k_kept, v_kept = gather(view, rows, lengths[chosen], work)
                shape = (len(chosen), k_kept.shape[1] + count, dim)
                k_RSD, v_RSD = (work.take(name, shape, k.dtype) for name in ("all k", "all v"))
                torch.cat([k_kept, k[token_RM, head_R1]], dim=1, out=k_RSD)
                torch.cat([v_kept, v[token_RM, head_R1]], dim=1, out=v_RSD)
                out_THGD[token_RM, head_R1] = attend(
                    q_THGD[token_RM, head_R1], k_RSD, v_RSD, scale, work, lengths[chosen]
                )
        return out

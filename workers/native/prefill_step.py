"""Short prompts through several layers of one rank in one call of native code.

Each layer computes what `decoder_layer.py` and the cpu attention backend compute, to the last bit.

Prompts may begin with tokens that are not computed, whose keys and values are in pages.

Shapes: T packed tokens of N prompts, R of them that are wanted after the model's last layer;
L layers of the call, E hidden size, Hq query heads, H kv heads, D head dim, P pages.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import function, pointer
from .linear import bf16
from .step_layers import Seconds, StepLayers


class _Step(ctypes.Structure):
    """`Step` of prefill_step.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("layers", "hidden", "positions", "cu", "refs")),
        *((name, c_void_p) for name in ("k_pages", "v_pages", "cached", "cached_kept")),
        *((name, c_void_p) for name in ("q", "k", "v", "lse", "windows")),
        *((name, c_void_p) for name in ("wanted_cu", "wanted_rows", "wanted", "seconds")),
        *((name, c_int64) for name in ("num_layers", "rows", "num_sequences", "num_wanted")),
        *((name, c_int64) for name in ("cached_pages", "page_tokens", "keeps_all", "threads")),
        *((name, c_float) for name in ("scale", "softcap")),
    )


@dataclass(frozen=True, slots=True)
class Prompts:
    """Packed prompts.

    Attributes:
        hidden: before the first layer, bf16 [T, E]; receives those after the last one, or means
            nothing afterwards where only some are wanted.
        positions: of the tokens, int64 [T].
        cu: where each prompt begins, int32 [N + 1].
    """

    hidden: Tensor
    positions: Tensor
    cu: Tensor


@dataclass(frozen=True, slots=True)
class Fresh:
    """Room for what is computed on the way.

    Attributes:
        q: rotated queries, bf16 [L, T, Hq, D], or [1, T, Hq, D] if each layer may overwrite those
            of the layer before.
        k: rotated keys, the same of H heads.
        v: values, likewise.
        lse: receives the normalisers of the softmax, float32 [L, T, Hq]; None if not wanted. Where
            only some rows are wanted of the last layer, its normalisers are not made.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PageWrites:
    """Where all keys and values are stored.

    Attributes:
        k_pages: bf16 [P, page_tokens, D].
        v_pages: the same of values.
        refs: where they go, int64 [L, T, H], in tokens of the flat pool; negative: nowhere.
    """

    k_pages: Tensor
    v_pages: Tensor
    refs: Tensor


@dataclass(frozen=True, slots=True)
class CachedPages:
    """Keys and values of the prompts' first tokens, which are not computed.

    Attributes:
        k_pages: bf16 [P, page_tokens, D].
        v_pages: the same of values.
        table: the pages before the fresh tokens of each prompt, int32 [L, N, H, pages].
        kept: how many tokens these have, int32 [L, N, H].
    """

    k_pages: Tensor
    v_pages: Tensor
    table: Tensor
    kept: Tensor


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of the last layer.

    Attributes:
        cu: where each prompt's wanted rows begin, int32 [N + 1].
        rows: which tokens they are, the last ones of each prompt, int64 [R].
        hidden: receives their hidden states after the layer, bf16 [R, E].
    """

    cu: Tensor
    rows: Tensor
    hidden: Tensor


class PrefillStep:
    """Some of the layers of one rank.

    Args:
        layers: all of them.
        windows: in each, how many of the last tokens a token sees, itself included; 0: all.
    """

    def __init__(self, layers: StepLayers, windows: Sequence[int]) -> None:
        assert len(windows) == len(layers), (windows, len(layers))
        self._layers = layers
        self._windows = torch.tensor(windows, dtype=torch.int32)
        self._run = function("saqqara_prefill_step", (c_void_p,))

    def __call__(
        self,
        layers: range,
        prompts: Prompts,
        fresh: Fresh,
        writes: PageWrites | None = None,
        wanted: Wanted | None = None,
        cached: CachedPages | None = None,
        *,
        timed: bool = False,
    ) -> tuple[float, ...]:
        """Take prompts through adjacent layers.

        Args:
            layers: which of the rank's.
            prompts: their tokens.
            fresh: room.
            writes: where keys and values are stored; None if the caller sees to that.
            wanted: what is wanted of the last layer; None for all.
            cached: what comes before the prompts' tokens; None: nothing.
            timed: whether the parts are timed.

        Returns:
            Seconds of each of `PARTS`, summed over the layers; nothing unless `timed`.
        """
        of, num_tokens = self._layers, len(prompts.hidden)
        num_rooms = len(fresh.q)
        assert num_rooms in (1, len(layers)), (fresh.q.shape, layers)
        self._check_fresh(fresh, len(layers), num_tokens)
        assert prompts.positions.shape == (num_tokens,), prompts.positions.shape
        seconds = Seconds()
        step = _Step(
            layers=of.address(layers.start),
            hidden=bf16(prompts.hidden),
            positions=pointer(prompts.positions, torch.int64),
            cu=pointer(prompts.cu, torch.int32),
            q=bf16(fresh.q),
            k=bf16(fresh.k),
            v=bf16(fresh.v),
            lse=None if fresh.lse is None else pointer(fresh.lse, torch.float32),
            windows=pointer(self._windows[layers.start :], torch.int32),
            seconds=ctypes.addressof(seconds) if timed else None,
            num_layers=len(layers),
            rows=num_tokens,
            num_sequences=len(prompts.cu) - 1,
            keeps_all=num_rooms == len(layers),
            threads=torch.get_num_threads(),
            scale=of.scale,
            softcap=of.softcap,
        )
        if writes is not None:
            assert writes.refs.shape == (len(layers), num_tokens, of.num_kv_heads)
            step.k_pages, step.v_pages = bf16(writes.k_pages), bf16(writes.v_pages)
            step.refs = pointer(writes.refs, torch.int64)
        if cached is not None:
            rows, pages = (
                (len(layers), len(prompts.cu) - 1, of.num_kv_heads),
                cached.table.shape[-1],
            )
            assert cached.kept.shape == rows, (cached.kept.shape, rows)
            assert cached.table.shape == (*rows, pages), (cached.table.shape, rows)
            step.k_pages, step.v_pages = bf16(cached.k_pages), bf16(cached.v_pages)
            step.cached = pointer(cached.table, torch.int32)
            step.cached_kept = pointer(cached.kept, torch.int32)
            step.cached_pages, step.page_tokens = pages, cached.k_pages.shape[1]
        if wanted is not None:
            assert len(wanted.cu) == len(prompts.cu), (wanted.cu, prompts.cu)
            assert wanted.hidden.shape == (len(wanted.rows), of.hidden_size), wanted.hidden.shape
            step.wanted_cu = pointer(wanted.cu, torch.int32)
            step.wanted_rows = pointer(wanted.rows, torch.int64)
            step.wanted, step.num_wanted = bf16(wanted.hidden), len(wanted.rows)
        self._run(ctypes.addressof(step))
        return tuple(seconds) if timed else ()

    def _check_fresh(self, fresh: Fresh, num_layers: int, num_tokens: int) -> None:
        of, num_rooms = self._layers, len(fresh.q)
        assert fresh.q.shape == (num_rooms, num_tokens, of.num_query_heads, of.head_dim)
        assert (
            fresh.k.shape == fresh.v.shape == (num_rooms, num_tokens, of.num_kv_heads, of.head_dim)
        )
        if fresh.lse is not None:
            assert fresh.lse.shape == (num_layers, num_tokens, of.num_query_heads), fresh.lse.shape

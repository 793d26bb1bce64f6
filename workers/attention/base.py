"""What an attention backend does, and which one to take.

Shapes: T packed tokens, N sequences, Hq local query heads, H local kv heads, D head dim, P pages.
Query heads of one kv head are neighbours: query head `i` belongs to kv head `i // (Hq / H)`.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from saqqara.workers.kv.view import KVView
from saqqara.workers.transfer import to_device


@dataclass(frozen=True, slots=True)
class CuSeqlens:
    """Where each of N sequences starts in a packed tensor.

    Attributes:
        host: N + 1 offsets, from 0 to T.
        device: the same as an int32 tensor.
        max_len: the longest sequence.
    """

    host: tuple[int, ...]
    device: Tensor
    max_len: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "CuSeqlens":
        """From the length of each sequence."""
        host = (0, *accumulate(int(length) for length in lengths))
        return cls(
            host=host,
            device=to_device(np.array(host, dtype=np.int32), device),
            max_len=max(lengths, default=0),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length of each sequence."""
        return tuple(b - a for a, b in zip(self.host, self.host[1:], strict=False))


class AttentionBackend(Protocol):
    """Causal attention over fresh keys and over pages. Outputs have the dtype of the queries.

    Attributes:
        name: in the registry.
        softcap: scores s, scaled, become `softcap * tanh(s / softcap)` in all that a backend
            computes (Gemma 2, arXiv 2408.00118, section 2); 0: they do not.
    """

    name: str
    softcap: float

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: CuSeqlens,
        cu_k: CuSeqlens,
        scale: float,
        window: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of whole prompts over themselves.

        Args:
            q: [Tq, Hq, D]; in each sequence the queries of its *last* tokens (no more than it has
                keys), so the last query sees every key, the one before all but one, and so on.
            k: [Tk, H, D].
            v: [Tk, H, D].
            cu_q: sequences in `q`.
            cu_k: the same sequences in `k` and `v`.
            scale: factor of the scores.
            window: a query sees so many of the keys up to its own, at most; 0: all.

        Returns:
            [Tq, Hq, D], and the normalisers of the softmax for `mass`: float32 [Tq, Hq], the
            logarithm of the sum of the exponentials of each query's scores, or None from a backend
            to which that is work.
        """
        ...

    def decode(self, q: Tensor, view: KVView, scale: float) -> Tensor:
        """Attention of one query per sequence over everything its rows keep.

        Args:
            q: [N, Hq, D].
            view: the rows, the new token included. Rows without tokens give zeros.
            scale: factor of the scores.

        Returns:
            [N, Hq, D].
        """
        ...

    def decode_and_lse(self, q: Tensor, view: KVView, scale: float) -> tuple[Tensor, Tensor]:
        """`decode`, and the normaliser of each query's softmax.

        Returns:
            [N, Hq, D], and float32 [N, Hq]: the logarithm of the sum of the exponentials of each
            query's scores, -inf for rows without tokens.
        """
        ...

    def decode_and_mass(self, q: Tensor, view: KVView, scale: float) -> tuple[Tensor, Tensor]:
        """`decode`, and how much attention every kept token got.

        Returns:
            [N, Hq, D], and float32 [N, H, view.max_length]: summed over the query heads of a kv
            head, 0 past the end of a row.
        """
        ...

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, cu: CuSeqlens, view: KVView, scale: float
    ) -> Tensor:
        """Attention of several new tokens per sequence over kept pages and over themselves.

        Args:
            q: [T, Hq, D].
            k: keys of the new tokens, [T, H, D]. Each new token sees those up to its own.
            v: values of the new tokens, [T, H, D].
            cu: the new tokens of each sequence.
            view: the rows *without* the new tokens. Every new token sees all of them.
            scale: factor of the scores.

        Returns:
            [T, Hq, D].
        """
        ...

    def mass(
        self,
        q_window: Tensor,
        k: Tensor,
        scale: float,
        query_weights: Tensor | None = None,
        lse: Tensor | None = None,
        num_columns: int | None = None,
    ) -> Tensor:
        """How much attention each key of one sequence gets from its last queries.

        Args:
            q_window: queries of the last w tokens, [w, Hq, D].
            k: all keys, [n, H, D].
            scale: factor of the scores.
            query_weights: [w], a factor for each query; default: 1.
            lse: float32 [w, Hq], what `prefill` returned of these queries; it saves work.
            num_columns: only the masses of so many first keys; default: of all.

        Returns:
            float32 [H, num_columns]: causal softmax attention, summed over the window's queries
            and over the query heads of each kv head.
        """
        ...

    def normalisers(self, q_window: Tensor, k: Tensor, scale: float) -> Tensor:
        """The normalisers of the last queries of one sequence, as `prefill` may return them.

        Args:
            q_window: queries of the last w tokens, [w, Hq, D].
            k: all keys, [n, H, D].
            scale: factor of the scores.

        Returns:
            float32 [w, Hq]: the logarithm of the sum of the exponentials of each query's scores.
        """
        ...


_BACKENDS = {  # name: (module in this package, class); imported when asked for
    "reference": ("reference", "ReferenceAttention"),
    "torch": ("sdpa", "TorchAttention"),
    "cpu": ("cpu", "CpuAttention"),
    "triton": ("triton", "TritonAttention"),
}
_UNAVAILABLE = {  # name: the module whose `unavailable_reason(device, dtype)` says what is missing
    "cpu": "cpu",
    "triton": "triton",
}


def get_backend(
    name: str, device: torch.device, dtype: torch.dtype, softcap: float = 0.0
) -> tuple[AttentionBackend, str]:
    """The attention backend of a name, and why it is this one.

    Args:
        name: a registered name, or "auto" for the best one for `device` and `dtype`.
        device: where queries and pages live.
        dtype: of queries, keys and values.
        softcap: of the scores; see `AttentionBackend`.

    Raises:
        ValueError: no backend has this name, or this machine cannot run it.
    """
    if name == "auto":
        chosen, reason = _choose(device, dtype)
    else:
        chosen, reason = name, f"attention_backend={name!r}"
    if chosen not in _BACKENDS:
        known = ", ".join(["auto", *_BACKENDS])
        raise ValueError(f"attention_backend: no backend {name!r}; known: {known}")
    if (missing := _unavailable(chosen, device, dtype)) is not None:
        raise ValueError(f"attention_backend={chosen!r} cannot be had here: {missing}")
    module, class_name = _BACKENDS[chosen]
    backend_class = getattr(importlib.import_module(f".{module}", __package__), class_name)
    backend: AttentionBackend = backend_class(softcap=softcap)
    return backend, reason


def _choose(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and dtype == torch.bfloat16:
        missing = _unavailable("cpu", device, dtype)
        if missing is None:
            return "cpu", "auto: native kernels for bfloat16"
        return "torch", f"auto: no native kernels ({missing})"
    if device.type == "cuda":
        missing = _unavailable("triton", device, dtype)
        if missing is None:
            return "triton", f"auto: {name} on a GPU"
        return "torch", f"auto: no Triton kernels ({missing})"
    return "torch", f"auto: {name} on {device.type}"


def _unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this machine cannot run a backend, or None if it can."""
    if name not in _UNAVAILABLE:
        return None
    module = importlib.import_module(f".{_UNAVAILABLE[name]}", __package__)
    reason: str | None = module.unavailable_reason(device, dtype)
    return reason

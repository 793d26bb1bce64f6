"""How the ranks of a replica talk. The only place where torch.distributed is set up."""

import logging
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, not in __all__

from . import shared_memory, symmetric
from .layout import GroupKind, MeshLayout, rank_groups

if TYPE_CHECKING:
    from saqqara.workers.native.exchange import Exchange

logger = logging.getLogger(__name__)

_MAX_PENDING_SENDS = 8


def start_store(host: str = "127.0.0.1") -> TCPStore:
    """Start the rendezvous server of a replica on a free port of `host`; rank 0 keeps it.

    It listens on that address only (TCPStore by itself would listen on every interface).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


class Mesh:
    """The process groups of one rank. With one rank a sum or a join is what went in.

    On a CPU, the ranks of a stage that are on one host exchange what they can through memory that
    they share; on GPUs of one host, small sums go through memory that they map of each other. What
    that is and why, or why not, is logged. Everything else goes over gloo or NCCL.

    Every rank of the replica must build its `Mesh` with the same arguments (but `rank`), and call
    collectives in the same order. Sends return at once; the tensor must not be changed afterwards.

    Args:
        layout: sizes of the mesh.
        rank: this rank.
        num_kv_heads: kv heads of the model; more ranks than that share heads (`reduce_replicas`).
        device: where tensors live; `cuda` talks over NCCL, `cpu` over gloo.
        store: host and port of the rendezvous server (`start_store`); None for one rank.
        timeout_seconds: how long an operation may wait for its peers.

    Raises:
        ValueError: several ranks without a store.
    """

    def __init__(
        self,
        layout: MeshLayout | None = None,
        rank: int = 0,
        num_kv_heads: int | None = None,
        device: torch.device | str = "cpu",
        store: tuple[str, int] | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.layout = layout = layout or MeshLayout()
        self.rank = rank
        self.device = torch.device(device)
        self.tensor_rank = layout.tensor_rank(rank)
        self.pipeline_rank = layout.pipeline_rank(rank)
        self._groups: dict[GroupKind, dist.ProcessGroup] = {}
        self._exchange: Exchange | None = None
        self._symmetric: symmetric.SymmetricSum | None = None
        self._pending: dict[str, deque[tuple[dist.Work, torch.Tensor]]] = {
            "hidden": deque(),
            "tokens": deque(),
        }
        if layout.world_size > 1:
            if store is None:
                raise ValueError(
                    f"store: {layout.world_size} ranks need a rendezvous host and port"
                )
            self._connect(store, num_kv_heads, timedelta(seconds=timeout_seconds))

    def _connect(
        self, store: tuple[str, int], num_kv_heads: int | None, timeout: timedelta
    ) -> None:
        layout = self.layout
        rendezvous = TCPStore(*store, is_master=False, timeout=timeout)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=rendezvous,
            rank=self.rank,
            world_size=layout.world_size,
            timeout=timeout,
        )
        for kind, ranks in rank_groups(layout, num_kv_heads):
            # Every rank makes every group, in the same order, its own or not.
            group = dist.new_group(ranks, timeout=timeout)
            if self.rank in ranks:
                assert group is not None
                self._groups[kind] = group
        if layout.tensor_size > 1 and self.device.type == "cpu":
            self._share_memory(rendezvous, timeout.total_seconds())
        elif layout.tensor_size > 1:
            self._map_memory(rendezvous)

    def _share_memory(self, store: TCPStore, timeout_seconds: float) -> None:
        """Let the ranks of this stage share memory if they can."""
        own = PrefixStore(f"shared-memory/{self.pipeline_rank}", store)
        size = self.layout.tensor_size
        self._exchange, why = shared_memory.join(own, self.tensor_rank, size, timeout_seconds)
        if self.tensor_rank == 0:
            means = "gloo" if self._exchange is None else "shared memory"
            logger.info("stage %d: tensor ranks talk over %s (%s)", self.pipeline_rank, means, why)

    def _map_memory(self, store: TCPStore) -> None:
        """Let the GPUs of this stage map each other's memory if they can."""
        own = PrefixStore(f"symmetric-memory/{self.pipeline_rank}", store)
        group = self._groups["tensor"]
        self._symmetric, why = symmetric.join(
            own,
            self.tensor_rank,
            self.layout.tensor_size,
            symmetric.gpu_of(self.device),
            lambda: symmetric.map_buffers(self.device, group),
            group.group_name,
        )
        if self.tensor_rank == 0:
            means = "NCCL alone" if self._symmetric is None else "symmetric memory and NCCL"
            logger.info("stage %d: tensor ranks talk over %s (%s)", self.pipeline_rank, means, why)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the LM head."""
        return self.pipeline_rank == self.layout.pipeline_size - 1

    @property
    def shares_memory(self) -> bool:
        """Whether the ranks of this stage exchange sums through memory that they share."""
        return self._exchange is not None

    @property
    def maps_memory(self) -> bool:
        """Whether the GPUs of this stage sum through memory that they map of each other."""
        return self._symmetric is not None

    def piece_rows(self, x: torch.Tensor) -> int:
        """Rows of x [T, E] that are summed over the ranks in one go; more go piece by piece."""
        if self._exchange is None:
            return max(1, len(x))
        return max(1, self._exchange.slot_bytes // (x.shape[-1] * x.itemsize))

    def partial_like(self, x: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor like x, for this rank's part of a sum.

        Where ranks share memory and x has at most `piece_rows`, it lies there, and `all_reduce` has
        nothing to copy. It may be used until the next collective of this mesh.
        """
        partial = None
        if self._exchange is not None and self._exchange.adds(x.dtype):
            partial = self._exchange.partial_like(x)
        return torch.empty_like(x) if partial is None else partial

    def all_reduce(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over the ranks of this stage, plus `residual`, rounded once; all get the same bits.

        Args:
            x: this rank's part; may be overwritten.
            residual: like x and the same on all ranks, or None.
            out: receives the sum and is returned; None for x or a new tensor, and x must not come
                from `partial_like`. It may be `residual`.
        """
        if self._symmetric is not None and self._symmetric.takes(x):
            total = self._symmetric.all_reduce(x)
            total = total if residual is None else total.add_(residual)
            return total if out is None else out.copy_(total)
        target = x if out is None else out
        if self._exchange is None or not self._exchange.adds(x.dtype):
            return _sum(x, self._groups.get("tensor"), residual, target)
        dense = target if target.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)
        residual = residual if residual is None else residual.contiguous()
        self._exchange.all_reduce(x.contiguous(), residual, dense)
        return target if dense is target else target.copy_(dense)

    def reduce_replicas(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold the same kv heads, in place; returns `x`."""
        return _sum(x, self._groups.get("replicas"), None, x)

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """Join the equal shards [..., V/t] of this stage's ranks to [..., V]."""
        if self._exchange is not None:
            return self._exchange.all_gather_last(x)
        group = self._groups.get("tensor")
        if group is None:
            return x
        shards = [torch.empty_like(x) for _ in range(self.layout.tensor_size)]
        dist.all_gather(shards, x.contiguous(), group=group)
        return torch.cat(shards, dim=-1)

    def broadcast(self, x: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Overwrite `x`, contiguous, with that of tensor rank `root` of this stage; returns `x`."""
        if self._exchange is not None:
            self._exchange.broadcast(x, root)
        elif (group := self._groups.get("tensor")) is not None:
            source = self.layout.rank(self.pipeline_rank, root)
            dist.broadcast(x, src=source, group=group)
        return x

    def send_hidden(self, x: torch.Tensor) -> None:
        """Send hidden states, or positions, to this rank's counterpart in the next stage.

        It returns without waiting.
        """
        assert not self.is_last_stage, "the last stage has no next stage"
        self._send(x, self.rank + self.layout.tensor_size, "hidden")

    def recv_hidden(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Receive hidden states, or positions, from this rank's counterpart in the stage before.

        They come in the order in which they were sent.
        """
        assert not self.is_first_stage, "the first stage has no stage before it"
        x = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(x, src=self.rank - self.layout.tensor_size, group=self._groups["hidden"])
        return x

    def send_tokens(self, x: torch.Tensor) -> None:
        """Send sampled tokens, int64 [n], from the last stage to the first, without waiting.

        With one stage there is nobody to send to.
        """
        assert self.is_last_stage, "tokens are sampled in the last stage"
        assert not self.is_first_stage, "one stage needs no sends"
        assert x.dtype == torch.int64, f"tokens are int64, not {x.dtype}"
        first = self.layout.rank(0, self.tensor_rank)
        self._send(x.to(self.device), first, "tokens")

    def irecv_tokens(self, count: int) -> "TokenReceipt":
        """Begin to receive `count` sampled tokens, in the order of `send_tokens`.

        Whoever sends waits for that, so a rank says it as soon as it knows that tokens will come.
        """
        assert self.is_first_stage, "tokens go to the first stage"
        assert not self.is_last_stage, "one stage needs no sends"
        x = torch.empty(count, dtype=torch.int64, device=self.device)
        last = self.layout.rank(self.layout.pipeline_size - 1, self.tensor_rank)
        work = dist.irecv(x, src=last, group=self._groups["tokens"])
        assert work is not None
        return TokenReceipt(work, x)

    def barrier(self) -> None:
        """Wait for all ranks of the replica."""
        if self.layout.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process groups, dropping sends that nobody received."""
        for pending in self._pending.values():
            pending.clear()
        self._exchange = None
        self._symmetric = None
        if self.layout.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def gather_heads(
        self, x: torch.Tensor, heads: Sequence[range], *, are_parts: bool = False
    ) -> torch.Tensor:
        """Join the rows [H, m] of this stage's ranks, one row per kv head, to those of all heads.

        Args:
            x: rows of this rank's heads.
            heads: the kv heads of each tensor rank, in the order of the ranks.
            are_parts: ranks that hold the same head each have a part of its row, which are summed
                in the order of the ranks; else all of them have the same row.

        Returns:
            One row per head, each head once and in order; the same bits on every rank.
        """
        if self.layout.tensor_size == 1:
            return x
        most, num_columns = max(map(len, heads)), x.shape[1]
        padded = x.new_zeros(most, num_columns)
        padded[: len(x)] = x
        by_rank = self.all_gather_last(padded.flatten()).view(len(heads), most, num_columns)
        whole = x.new_zeros(heads[-1].stop, num_columns)
        for held, rows in zip(heads, by_rank, strict=True):
            mine = whole[held.start : held.stop]
            if are_parts:
                mine += rows[: len(held)]
            else:
                mine.copy_(rows[: len(held)])
        return whole

    def _send(self, x: torch.Tensor, to: int, kind: Literal["hidden", "tokens"]) -> None:
        pending = self._pending[kind]
        while pending and (len(pending) >= _MAX_PENDING_SENDS or pending[0][0].is_completed()):
            pending.popleft()[0].wait()
        x = x.contiguous()
        work = dist.isend(x, dst=to, group=self._groups[kind])
        assert work is not None
        pending.append((work, x))


@dataclass(frozen=True, slots=True)
class TokenReceipt:
    """Sampled tokens on their way from the last stage to the first."""

    work: dist.Work
    tokens: torch.Tensor

    def wait(self) -> torch.Tensor:
        """The tokens, int64 [n], once they are there."""
        self.work.wait()
        return self.tokens


def _sum(
    x: torch.Tensor,
    group: dist.ProcessGroup | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """`out` becomes the group's sum of x, plus the residual; x may be lost."""
    if group is not None:
        if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()  # gloo would round at every hop; one rounding at the end instead
        dist.all_reduce(x, group=group)
    if residual is not None:
        x = x.add_(residual)
    return x if out is x else out.copy_(x)

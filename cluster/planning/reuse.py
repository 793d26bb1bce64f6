"""Memory that is used again, on paper: what of it lies in the pool, and what in the nodes' own."""

from collections.abc import Iterable
from dataclasses import dataclass

from saqqara.workers.footprint import GIB

from .memory import RankMemory

HOST_BYTES_PER_GPU = 4 * GIB  # at most, without `host_kv_gib`; as `workers/sizing.py` has it


@dataclass(frozen=True, slots=True)
class ReuseSizes:
    """Settings; names and defaults as `EngineConfig`'s."""

    prefix_cache_gib: float | None = None
    conversation_gib: float | None = None
    host_kv_gib: float | None = None


@dataclass(frozen=True, slots=True)
class ReusedMemory:
    """Most bytes of what is used again.

    Attributes:
        prefix_bytes: of cached prefixes in a replica's pool.
        conversation_bytes: of conversations that wait for their next turn, of a replica.
        host_bytes_per_node: of a node's own memory, page-locked, for preempted sequences and
            conversations of all ranks there.
    """

    prefix_bytes: int
    conversation_bytes: int
    host_bytes_per_node: int


def reused_memory(
    sizes: ReuseSizes, ranks: Iterable[RankMemory], *, replicas: int, num_nodes: int, is_gpu: bool
) -> ReusedMemory:
    """What a layout holds of it.

    Args:
        sizes: the settings.
        ranks: of one replica.
        replicas: of the layout.
        num_nodes: over which all ranks are spread evenly.
        is_gpu: whether the ranks are on GPUs; on a CPU there is none without a setting, which is
            taken from the pool.
    """
    pools = [rank.pool_bytes for rank in ranks]
    pool = sum(pools)
    host = len(pools) * HOST_BYTES_PER_GPU if is_gpu else 0
    if sizes.host_kv_gib is not None:
        host = int(sizes.host_kv_gib * GIB)
    return ReusedMemory(
        prefix_bytes=_bounded(sizes.prefix_cache_gib, pool, pool // 2),
        conversation_bytes=_bounded(sizes.conversation_gib, pool + host, pool // 4),
        host_bytes_per_node=-(-host * replicas // num_nodes),
    )


def _bounded(gib: float | None, most: int, default: int) -> int:
    return default if gib is None else min(int(gib * GIB), most)

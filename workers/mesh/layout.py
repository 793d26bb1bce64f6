"""The ranks of a replica, and which heads, layers and channels each of them owns.

Rank = pipeline_rank * tensor_size + tensor_rank.
"""

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

_CHANNEL_MULTIPLE = 8
_ROUNDING = 1e-9
_MORE_WEIGHTS = 1.1

GroupKind = Literal["tensor", "replicas", "hidden", "tokens"]


@dataclass(frozen=True, slots=True)
class MeshLayout:
    """How ranks form `pipeline_size` stages of `tensor_size` ranks each."""

    tensor_size: int = 1
    pipeline_size: int = 1

    @property
    def world_size(self) -> int:
        """All ranks of the replica."""
        return self.tensor_size * self.pipeline_size

    def pipeline_rank(self, rank: int) -> int:
        """The stage of a rank."""
        return rank // self.tensor_size

    def tensor_rank(self, rank: int) -> int:
        """The place of a rank within its stage."""
        return rank % self.tensor_size

    def rank(self, pipeline_rank: int, tensor_rank: int) -> int:
        """The rank at a place."""
        return pipeline_rank * self.tensor_size + tensor_rank


@dataclass(frozen=True, slots=True)
class HeadShard:
    """The heads of one tensor rank, as ranges of global head ids.

    `replica_group` names the tensor ranks that hold the same kv heads, this one included; it has
    more than one only where there are more ranks than kv heads.
    """

    kv: range
    query: range
    replica_group: tuple[int, ...]

    @property
    def replicated(self) -> bool:
        """Whether another rank holds the same kv heads."""
        return len(self.replica_group) > 1


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Rows `[start, stop)` of the vocabulary on one rank, padded with zeros to `size` rows."""

    start: int
    stop: int
    size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class StageCosts:
    """What stages are balanced by: the larger of their time and of their bytes.

    Attributes:
        seconds: of each layer, the mean layer's being 1.
        num_bytes: of each layer, weights and what it keeps, the mean layer's being 1.
        end_bytes: of the embedding, and of the head.
        end_layers: the weights of either, counted in layers.
    """

    seconds: tuple[float, ...]
    num_bytes: tuple[float, ...]
    end_bytes: float
    end_layers: float


def rank_groups(
    layout: MeshLayout, num_kv_heads: int | None
) -> Iterator[tuple[GroupKind, list[int]]]:
    """The groups of ranks that talk among themselves, in the order in which all ranks make them.

    A rank is in at most one of each kind: *tensor*, the ranks of its stage; *replicas*, those of
    them that share its kv head; *hidden*, its counterparts in all stages; *tokens*, the first and
    the last of these. Tokens flow backwards; on the group of the hidden states they would wait for
    them.
    """
    stages, tensors = range(layout.pipeline_size), range(layout.tensor_size)
    if layout.tensor_size > 1:
        for stage in stages:
            yield "tensor", [layout.rank(stage, tensor) for tensor in tensors]
    if num_kv_heads is not None and layout.tensor_size > num_kv_heads:
        of_heads = [split_evenly(layout.tensor_size, num_kv_heads, h) for h in range(num_kv_heads)]
        for stage in stages:
            for sharing in of_heads:
                if len(sharing) > 1:
                    yield "replicas", [layout.rank(stage, tensor) for tensor in sharing]
    if layout.pipeline_size > 1:
        for tensor in tensors:
            ranks = [layout.rank(stage, tensor) for stage in stages]
            yield "hidden", ranks
            yield "tokens", [ranks[0], ranks[-1]]


def split_evenly(total: int, parts: int, index: int) -> range:
    """Part `index` of `range(total)` cut into `parts`; the first parts are one longer."""
    size, extra = divmod(total, parts)
    start = index * size + min(index, extra)
    return range(start, start + size + (index < extra))


def head_shard(
    num_query_heads: int, num_kv_heads: int, tensor_size: int, tensor_rank: int
) -> HeadShard:
    """The heads of one tensor rank.

    Kv heads are split as evenly as possible (3 on 2 ranks = 2 + 1) and query heads follow their
    kv head. With more ranks than kv heads, the ranks are grouped per kv head and split its query
    heads.

    Raises:
        ValueError: more ranks than query heads.
    """
    if tensor_size > num_query_heads:
        raise ValueError(
            f"tensor_parallel_size={tensor_size} exceeds the model's {num_query_heads} query "
            f"heads; it can be at most {num_query_heads}"
        )
    group_size = num_query_heads // num_kv_heads
    if tensor_size <= num_kv_heads:
        kv = split_evenly(num_kv_heads, tensor_size, tensor_rank)
        query = range(kv.start * group_size, kv.stop * group_size)
        return HeadShard(kv, query, (tensor_rank,))
    groups = [split_evenly(tensor_size, num_kv_heads, head) for head in range(num_kv_heads)]
    head = next(head for head, ranks in enumerate(groups) if tensor_rank in ranks)
    ranks = groups[head]
    part = split_evenly(group_size, len(ranks), tensor_rank - ranks.start)
    first = head * group_size
    return HeadShard(
        range(head, head + 1), range(first + part.start, first + part.stop), tuple(ranks)
    )


def vocab_shard(vocab_size: int, tensor_size: int, tensor_rank: int) -> VocabShard:
    """The vocabulary rows of one tensor rank; all ranks have the same padded size."""
    size = math.ceil(vocab_size / tensor_size)
    start = min(tensor_rank * size, vocab_size)
    return VocabShard(start, min(start + size, vocab_size), size, vocab_size)


def intermediate_shard(intermediate_size: int, tensor_size: int, tensor_rank: int) -> range:
    """The MLP channels of one tensor rank; uneven where needed, in multiples of 8 if possible.

    The split does not make up for uneven heads: ranks meet after attention and again after the MLP,
    so the slowest rank of each of the two counts, and a rank that waited for another's attention
    would then be waited for.

    Raises:
        ValueError: fewer channels than ranks.
    """
    if intermediate_size < tensor_size:
        raise ValueError(
            f"tensor_parallel_size={tensor_size} exceeds intermediate_size={intermediate_size}; it "
            f"can be at most {intermediate_size}"
        )
    unit = _CHANNEL_MULTIPLE
    if intermediate_size % unit or intermediate_size // unit < tensor_size:
        unit = 1
    part = split_evenly(intermediate_size // unit, tensor_size, tensor_rank)
    return range(part.start * unit, part.stop * unit)


def layer_split(
    num_layers: int,
    pipeline_size: int,
    head_layers: float = 0.0,
    explicit: tuple[int, ...] | None = None,
    costs: StageCosts | None = None,
) -> tuple[range, ...]:
    """The layers of each pipeline stage.

    Stages are balanced by layer count, the LM head of the last stage counting `head_layers`
    layers (`ModelSpec.head_layers`), or by `costs` where layers differ: the weights are certain and
    the load is not, so no stage then has a tenth more weights than the largest would have by layer
    count. `explicit` gives the layers per stage instead.

    Raises:
        ValueError: more stages than layers, or `explicit` does not add up.
    """
    if pipeline_size > num_layers:
        raise ValueError(
            f"pipeline_parallel_size={pipeline_size} exceeds the model's {num_layers} layers; it "
            f"can be at most {num_layers}"
        )
    if explicit is not None:
        counts = explicit
    elif costs is None:
        counts = _balanced_counts(num_layers, pipeline_size, head_layers)
    else:
        counts = _balanced_costs(costs, pipeline_size, head_layers)
    if len(counts) != pipeline_size or sum(counts) != num_layers or min(counts) < 1:
        raise ValueError(
            f"layer_split={list(counts)} must have {pipeline_size} positive entries (one per "
            f"pipeline stage) that add up to the model's {num_layers} layers"
        )
    starts = [sum(counts[:stage]) for stage in range(pipeline_size)]
    return tuple(range(a, a + n) for a, n in zip(starts, counts, strict=True))


def _balanced_counts(num_layers: int, pipeline_size: int, head_layers: float) -> tuple[int, ...]:
    if pipeline_size == 1:
        return (num_layers,)
    others = pipeline_size - 1

    def cost(last: int) -> tuple[float, float]:
        largest = max(math.ceil((num_layers - last) / others), last + head_layers)
        return largest, abs(last + head_layers - (num_layers - last) / others)

    last = min(range(1, num_layers - others + 1), key=cost)
    # Lower layers keep more KV under a pyramid, so the extra layers go to the later stages.
    counts = [len(split_evenly(num_layers - last, others, stage)) for stage in range(others)]
    return (*reversed(counts), last)


@lru_cache(maxsize=1024)
def _balanced_costs(costs: StageCosts, num_stages: int, head_layers: float) -> tuple[int, ...]:
    """Layers of each stage: the costliest as cheap as can be, then all as even as can be."""
    num_layers = len(costs.seconds)
    seconds, num_bytes = ((0.0, *accumulate(each)) for each in (costs.seconds, costs.num_bytes))
    even = _balanced_counts(num_layers, num_stages, head_layers)

    def num_ends(stage: int) -> int:
        return int(stage == 0) + int(stage == num_stages - 1)

    def weights(stage: int, size: int) -> float:
        return size + num_ends(stage) * costs.end_layers

    most = _MORE_WEIGHTS * max(weights(stage, size) for stage, size in enumerate(even))

    def cost(stage: int, start: int, stop: int) -> float:
        if weights(stage, stop - start) > most:
            return math.inf
        head = head_layers if stage == num_stages - 1 else 0.0
        held = num_bytes[stop] - num_bytes[start] + num_ends(stage) * costs.end_bytes
        return max(seconds[stop] - seconds[start] + head, held)

    costliest, _ = _cheapest(num_layers, num_stages, cost, max)

    def unevenness(stage: int, start: int, stop: int) -> float:
        each = cost(stage, start, stop)
        return each**2 if each <= costliest * (1 + _ROUNDING) else math.inf

    _, stops = _cheapest(num_layers, num_stages, unevenness, operator.add)
    return tuple(stop - start for start, stop in pairwise((0, *stops)))


def _cheapest(
    num_layers: int,
    num_stages: int,
    cost: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The least cost of all stages, joined one by one, and the layer at which each of them stops.

    Of equals, the one whose later stages are longer.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(num_stages):
        stops = range(stage + 1, num_layers - (num_stages - stage - 1) + 1)
        best = {
            stop: min(
                (join(so_far, cost(stage, start, stop)), (*before, stop))
                for start, (so_far, before) in best.items()
                if start < stop
            )
            for stop in stops
        }
    return best[num_layers]

"""Who owns what: every head, channel, vocabulary row and layer has its owner, none has two."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from saqqara.cluster.planning.models import model_of
from saqqara.compression.retention import Retention
from saqqara.workers.footprint import stage_layers
from saqqara.workers.mesh.layout import (
    MeshLayout,
    head_shard,
    intermediate_shard,
    layer_split,
    rank_groups,
    split_evenly,
    vocab_shard,
)
from saqqara.workers.mesh.mesh import Mesh

# (query heads, kv heads): plain, grouped, SmolLM2's 9/3, one kv head.
HEADS = [(8, 8), (8, 4), (9, 3), (32, 8), (12, 1), (14, 2)]


def test_layout_numbers_ranks_stage_by_stage() -> None:
    layout = MeshLayout(tensor_size=2, pipeline_size=3)
    assert layout.world_size == 6
    for rank in range(6):
        place = layout.pipeline_rank(rank), layout.tensor_rank(rank)
        assert place == divmod(rank, 2)
        assert layout.rank(*place) == rank


def test_three_kv_heads_on_two_ranks_are_two_and_one() -> None:
    first, second = head_shard(9, 3, 2, 0), head_shard(9, 3, 2, 1)
    assert (first.kv, first.query) == (range(2), range(6))
    assert (second.kv, second.query) == (range(2, 3), range(6, 9))
    assert not first.replicated
    assert second.replica_group == (1,)


def test_more_ranks_than_kv_heads_share_them() -> None:
    shards = [head_shard(9, 3, 5, rank) for rank in range(5)]
    assert [shard.kv.start for shard in shards] == [0, 0, 1, 1, 2]
    assert [len(shard.query) for shard in shards] == [2, 1, 2, 1, 3]
    assert [shard.replica_group for shard in shards] == [(0, 1), (0, 1), (2, 3), (2, 3), (4,)]


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), HEADS)
def test_every_query_head_has_one_owner_that_holds_its_kv_head(
    num_query_heads: int, num_kv_heads: int
) -> None:
    group_size = num_query_heads // num_kv_heads
    for tensor_size in range(1, num_query_heads + 1):
        shards = [
            head_shard(num_query_heads, num_kv_heads, tensor_size, rank)
            for rank in range(tensor_size)
        ]
        owned = [*itertools.chain.from_iterable(shard.query for shard in shards)]
        assert owned == [*range(num_query_heads)]
        for rank, shard in enumerate(shards):
            assert {head // group_size for head in shard.query} == {*shard.kv}
            assert len(shard.query) % len(shard.kv) == 0
            sharers = [other for other, s in enumerate(shards) if {*s.kv} & {*shard.kv}]
            assert shard.replica_group == tuple(sharers)
            assert rank in shard.replica_group
            assert shard.replicated == (len(sharers) > 1)


def test_more_ranks_than_query_heads_is_an_error() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=10 exceeds the model's 9 query"):
        head_shard(9, 3, 10, 0)


@pytest.mark.parametrize("vocab_size", [1, 7, 100, 49152])
@pytest.mark.parametrize("tensor_size", [1, 2, 3, 4])
def test_vocabulary_shards_are_equal_and_cover_it(vocab_size: int, tensor_size: int) -> None:
    shards = [vocab_shard(vocab_size, tensor_size, rank) for rank in range(tensor_size)]
    assert len({shard.size for shard in shards}) == 1
    rows = [row for shard in shards for row in range(shard.start, shard.stop)]
    assert rows == [*range(vocab_size)]
    # A token's place in the gathered logits is its id: only the end is padded.
    for rank, shard in enumerate(shards):
        assert shard.start == shard.stop or shard.start == rank * shard.size


@pytest.mark.parametrize("size", [7, 64, 1536, 8960, 11008])
@pytest.mark.parametrize("tensor_size", [1, 2, 3, 5])
def test_mlp_channels_are_covered(size: int, tensor_size: int) -> None:
    parts = [intermediate_shard(size, tensor_size, rank) for rank in range(tensor_size)]
    assert [*itertools.chain(*parts)] == [*range(size)]
    if size >= 64:
        assert all(part.start % 8 == 0 for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 8


def test_an_even_mlp_is_fastest_whatever_the_heads() -> None:
    """Ranks meet after attention and after the MLP: the slowest rank of each counts.

    SmolLM2-135M over two ranks, 2 + 1 kv heads, multiply-adds per token.
    """
    hidden, head_dim, kept_tokens = 576, 64, 1024
    heads = [head_shard(9, 3, 2, rank) for rank in range(2)]
    attention = [
        len(shard.query) * head_dim * (2 * hidden + 2 * kept_tokens)  # q, o; scores, values
        + len(shard.kv) * head_dim * 2 * hidden  # k, v
        for shard in heads
    ]

    def slowest(first_channels: int) -> int:
        channels = (first_channels, 1536 - first_channels)
        return max(attention) + max(3 * hidden * count for count in channels)

    even = len(intermediate_shard(1536, 2, 0))
    assert slowest(even) == min(slowest(count) for count in range(8, 1536, 8))
    total = sum(attention) + 3 * hidden * 1536
    assert 0.75 * slowest(even) < total / 2 < slowest(even)


def test_fewer_mlp_channels_than_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="intermediate_size=3"):
        intermediate_shard(3, 4, 0)


def test_split_evenly_gives_the_first_parts_more() -> None:
    assert [len(split_evenly(10, 4, part)) for part in range(4)] == [3, 3, 2, 2]


def counts(*args: object, **kwargs: object) -> list[int]:
    ranges = layer_split(*args, **kwargs)  # type: ignore[arg-type]
    assert [*itertools.chain(*ranges)] == [*range(ranges[-1].stop)]
    return [len(layers) for layers in ranges]


def test_layers_are_balanced() -> None:
    assert counts(30, 1) == [30]
    assert counts(30, 2) == [15, 15]
    assert counts(32, 4) == [8, 8, 8, 8]
    assert counts(5, 5) == [1, 1, 1, 1, 1]
    assert max(counts(31, 4)) == 8


def test_the_head_counts_as_layers_of_the_last_stage() -> None:
    """SmolLM2-135M: a vocabulary of 49,152 costs as much as 8 of its 30 layers."""
    assert counts(30, 2, 8.0) == [19, 11]
    assert counts(30, 2, 1000.0) == [29, 1]
    assert counts(80, 4, 1.25) == [20, 20, 21, 19]


@pytest.mark.parametrize(
    ("num_layers", "pipeline_size"), [(2, 2), (9, 3), (30, 2), (30, 5), (61, 3)]
)
@pytest.mark.parametrize("head_layers", [0.0, 0.7, 3.2, 40.0])
def test_no_split_has_a_cheaper_slowest_stage(
    num_layers: int, pipeline_size: int, head_layers: float
) -> None:
    *others, last = counts(num_layers, pipeline_size, head_layers)
    slowest = max(*others, last + head_layers)
    for size in range(1, num_layers - pipeline_size + 2):
        rest = -(-(num_layers - size) // (pipeline_size - 1))
        assert slowest <= max(rest, size + head_layers)


def test_an_explicit_split_is_honoured_and_checked() -> None:
    assert counts(30, 2, 8.0, (16, 14)) == [16, 14]
    with pytest.raises(ValueError, match=r"layer_split=\[16, 15\].*30 layers"):
        layer_split(30, 2, explicit=(16, 15))
    with pytest.raises(ValueError, match="layer_split"):
        layer_split(30, 2, explicit=(30,))
    with pytest.raises(ValueError, match="layer_split"):
        layer_split(30, 2, explicit=(30, 0))
    with pytest.raises(ValueError, match="pipeline_parallel_size=4 exceeds the model's 3 layers"):
        layer_split(3, 4)


def test_one_rank_needs_no_process_groups() -> None:
    import torch
    import torch.distributed as dist

    mesh = Mesh()
    x = torch.ones(3)
    assert mesh.all_reduce(x) is x
    assert mesh.reduce_replicas(x) is x
    assert mesh.all_gather_last(x) is x
    assert mesh.broadcast(x) is x
    mesh.barrier()
    mesh.close()
    assert mesh.is_first_stage
    assert mesh.is_last_stage
    assert not dist.is_initialized()


def test_several_ranks_need_a_store() -> None:
    with pytest.raises(ValueError, match="store: 2 ranks"):
        Mesh(MeshLayout(tensor_size=2))


@pytest.mark.parametrize("tensor_size", range(1, 7))
@pytest.mark.parametrize("pipeline_size", range(1, 5))
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 8])
def test_ranks_make_their_groups_in_one_order(
    tensor_size: int, pipeline_size: int, num_kv_heads: int
) -> None:
    """A rank is in one group of a kind, or in none: then it has nobody to talk to."""
    layout = MeshLayout(tensor_size, pipeline_size)
    groups = list(rank_groups(layout, num_kv_heads))
    num_query_heads = 6 * num_kv_heads  # enough for any number of these ranks
    for rank in range(layout.world_size):
        stage, tensor = layout.pipeline_rank(rank), layout.tensor_rank(rank)
        shard = head_shard(num_query_heads, num_kv_heads, tensor_size, tensor)
        column = [layout.rank(s, tensor) for s in range(pipeline_size)]
        expected = {
            "tensor": [layout.rank(stage, t) for t in range(tensor_size)],
            "replicas": [layout.rank(stage, t) for t in shard.replica_group],
            "hidden": column,
            "tokens": [column[0], column[-1]],
        }
        for kind, ranks in expected.items():
            mine = [group for made, group in groups if made == kind and rank in group]
            is_end = kind != "tokens" or rank in ranks
            assert mine == ([ranks] if len(set(ranks)) > 1 and is_end else []), kind


def test_without_kv_heads_no_replicas_are_known() -> None:
    assert list(rank_groups(MeshLayout(3), None)) == [("tensor", [0, 1, 2])]
    assert list(rank_groups(MeshLayout(), 8)) == []


def stages_of(method: str, num_stages: int) -> list[int]:
    spec = model_of("llama-3-8b").spec
    budget = None if method in ("full", "pyramidinfer") else "25%"
    return [*map(len, stage_layers(spec, num_stages, None, Retention.parse(method, budget)))]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
def test_where_layers_keep_the_same_their_number_is_balanced(num_stages: int) -> None:
    spec = model_of("llama-3-8b").spec
    before = [*map(len, stage_layers(spec, num_stages))]
    for method in ("full", "snapkv", "recommended-adaptive"):
        assert stages_of(method, num_stages) == before
    given = stage_layers(spec, 2, (20, 12), Retention.parse("pyramidkv", "25%"))
    assert given == (range(20), range(20, 32))


def test_stages_whose_layers_keep_more_get_fewer_of_them() -> None:
    assert stages_of("full", 4) == [8, 8, 8, 8]
    assert stages_of("pyramidkv", 4) == [6, 8, 9, 9]
    assert stages_of("pyramidkv", 2) == [15, 17]  # the head of the last: a tenth more, no more
    assert stages_of("pyramidkv", 1) == [32]


def test_fewer_tokens_in_the_upper_layers_are_less_work_there() -> None:
    assert stages_of("pyramidinfer", 4) == [7, 7, 9, 9]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("num_layers", [6, 9])
@pytest.mark.parametrize("vocab_size", [1000, 128256])
def test_no_other_split_has_a_cheaper_costliest_stage(
    num_stages: int, num_layers: int, vocab_size: int
) -> None:
    """Against all of them, one after the other."""
    spec = replace(model_of("llama-3-8b").spec, num_layers=num_layers, vocab_size=vocab_size)
    retention = Retention.parse("pyramidkv", "25%")
    kept = retention.layer_tokens(4096, num_layers)
    head, layer = vocab_size * 4096, spec.layer_parameters
    held = [layer + 128 * 2 * 8 * 128 * tokens for tokens in kept]
    mean = sum(held) / num_layers
    even = [*map(len, stage_layers(spec, num_stages))]

    def weights(sizes: Sequence[int]) -> float:
        ends = [1, *[0] * (num_stages - 2), 1]
        return max(size * layer + end * head for size, end in zip(sizes, ends, strict=True))

    def costliest(sizes: Sequence[int]) -> float:
        costs = []
        for stage, size in enumerate(sizes):
            part = held[sum(sizes[:stage]) : sum(sizes[:stage]) + size]
            is_last = stage == num_stages - 1
            seconds = (size + sum(part) / mean) / 2 + is_last * 0.25 * head / layer
            ends = head * (stage == 0) + head * is_last
            costs.append(max(seconds, (sum(part) + ends) / mean))
        return max(costs)

    every = [
        sizes
        for sizes in itertools.product(range(1, num_layers + 1), repeat=num_stages)
        if sum(sizes) == num_layers and weights(sizes) <= 1.1 * weights(even)
    ]
    chosen = [*map(len, stage_layers(spec, num_stages, retention=retention))]
    assert tuple(chosen) in every
    assert costliest(chosen) == pytest.approx(min(map(costliest, every)))

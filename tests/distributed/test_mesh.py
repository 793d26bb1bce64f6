"""The mesh over real processes: sums, joins, shared heads, and sends between stages.

A rank reports what it computed and the test compares it with the
same computed in one process.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from support.ranks import Store, run_ranks

from saqqara.workers.mesh.layout import MeshLayout, head_shard, intermediate_shard, vocab_shard
from saqqara.workers.mesh.mesh import Mesh
from saqqara.workers.models.embedding import LMHead, VocabEmbedding, read_vocab_rows
from saqqara.workers.models.linear import column_parallel, row_parallel
from saqqara.workers.models.weights import DummyWeights
from saqqara.workers.native.build import unavailable_reason

Task = Callable[[Mesh], Any]


def _run_task(
    task: Task, layout: MeshLayout, num_kv_heads: int | None, rank: int, stores: Sequence[Store]
) -> Any:
    mesh = Mesh(layout, rank, num_kv_heads, store=stores[0], timeout_seconds=60.0)
    assert mesh.shares_memory == (layout.tensor_size > 1 and unavailable_reason() is None)
    result = task(mesh)
    mesh.barrier()
    mesh.close()
    return result


def run(task: Task, layout: MeshLayout, num_kv_heads: int | None = None) -> list[Any]:
    """What `task(mesh)` returns on each rank."""
    return run_ranks(partial(_run_task, task, layout, num_kv_heads), layout.world_size)


def _gather_heads(mesh: Mesh, *, are_parts: bool = False) -> list[list[float]]:
    """Of 3 heads, row h is 100 * h + column, and 1000 more on each stage."""
    size = mesh.layout.tensor_size
    heads = [head_shard(6, 3, size, rank).kv for rank in range(size)]
    whole = head_rows(mesh.pipeline_rank)
    held = heads[mesh.tensor_rank]
    mine = torch.tensor(whole)[held.start : held.stop]
    gathered = mesh.gather_heads(mine, heads, are_parts=are_parts)
    some = mesh.gather_heads(mine[:, 1:3], heads, are_parts=are_parts)
    assert torch.equal(some, gathered[:, 1:3]), "not contiguous"
    rows: list[list[float]] = gathered.tolist()
    return rows


def head_rows(stage: int) -> list[list[float]]:
    return [[1000.0 * stage + 100 * head + i for i in range(5)] for head in range(3)]


def _collectives(mesh: Mesh) -> dict[str, Any]:
    rank = mesh.rank
    out: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        x = torch.full((2, 3), rank + 1).to(dtype)
        assert mesh.all_reduce(x) is x, "sums are in place"
        out[str(dtype)] = x.tolist()
    out["gather"] = mesh.all_gather_last(torch.full((2, 2), rank)).tolist()
    out["broadcast"] = mesh.broadcast(torch.tensor([rank, 7]), root=1).tolist()
    out["replicas"] = mesh.reduce_replicas(torch.tensor([float(rank + 1)])).tolist()
    out["heads"] = _gather_heads(mesh)  # 2 + 1 on the two ranks of a stage
    out["parts"] = _gather_heads(mesh, are_parts=True)
    return out


def test_collectives_stay_within_the_stage() -> None:
    """Two stages of two ranks: ranks 0, 1 and ranks 2, 3 do not mix."""
    results = run(_collectives, MeshLayout(tensor_size=2, pipeline_size=2))
    for rank, out in enumerate(results):
        first = 2 * (rank // 2)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
            assert out[str(dtype)] == [[2 * first + 3] * 3] * 2
        assert out["gather"] == [[first, first, first + 1, first + 1]] * 2
        assert out["broadcast"] == [first + 1, 7]
        assert out["replicas"] == [rank + 1], "no head is shared: nothing is summed"
        assert out["heads"] == out["parts"] == head_rows(rank // 2)


def _four_ranks(mesh: Mesh) -> dict[str, Any]:
    values = [256.0, 1.0, 1.0, 1.0]
    return {
        "bfloat16": mesh.all_reduce(torch.tensor(values[mesh.rank], dtype=torch.bfloat16)).item(),
        "replicas": mesh.reduce_replicas(torch.tensor(10.0**mesh.rank)).item(),
        "all": mesh.all_reduce(torch.tensor(1.0)).item(),
        "heads": _gather_heads(mesh),
        "parts": _gather_heads(mesh, are_parts=True),
    }


def test_ranks_that_share_a_kv_head_sum_among_themselves() -> None:
    """3 kv heads on 4 ranks: ranks 0 and 1 share the first, the others hold one each.

    bfloat16 is summed in float32: 256 + 1 + 1 + 1 = 259, which rounds to 260; rounding at every
    hop would lose the ones.
    """
    assert head_shard(9, 3, 4, 1).replica_group == (0, 1)
    results = run(_four_ranks, MeshLayout(tensor_size=4), num_kv_heads=3)
    assert [out["replicas"] for out in results] == [11, 11, 100, 1000]
    assert {out["all"] for out in results} == {4}
    assert all(out["heads"] == head_rows(0) for out in results), "each head once"
    first, *others = head_rows(0)
    summed = [[2 * x for x in first], *others]
    assert all(out["parts"] == summed for out in results), "the parts of a shared head add up"
    assert {out["bfloat16"] for out in results} == {260}


NUM_SENDS = 40  # more than may be pending


def _pipeline(mesh: Mesh) -> list[Any]:
    """Hidden states run forward, tokens run back; the first stage is ahead by many sends."""
    shape = (5, 8)
    received: list[Any] = []
    if mesh.is_first_stage:
        receipts = []
        for step in range(NUM_SENDS):
            mesh.send_hidden(torch.full(shape, float(step + mesh.tensor_rank)))
            receipts.append(mesh.irecv_tokens(2))  # read at the end
        return [receipt.wait().tolist() for receipt in receipts]
    for step in range(NUM_SENDS):
        hidden = mesh.recv_hidden(shape, torch.float32)
        received.append((tuple(hidden.shape), set(hidden.flatten().tolist())))
        if mesh.is_last_stage:
            mesh.send_tokens(torch.tensor([step, mesh.rank]))
        else:
            mesh.send_hidden(hidden + 100)
    return received


@pytest.mark.parametrize("layout", [MeshLayout(1, 2), MeshLayout(2, 2), MeshLayout(1, 3)])
def test_hidden_states_run_forward_and_tokens_back(layout: MeshLayout) -> None:
    results = run(_pipeline, layout)
    for rank, received in enumerate(results):
        stage, tensor_rank = layout.pipeline_rank(rank), layout.tensor_rank(rank)
        if stage == 0:
            counterpart = layout.rank(layout.pipeline_size - 1, tensor_rank)
            assert received == [[step, counterpart] for step in range(NUM_SENDS)]
        else:
            offset = tensor_rank + 100 * (stage - 1)
            assert received == [((5, 8), {float(n + offset)}) for n in range(NUM_SENDS)]


def _sends_of_many_sizes(mesh: Mesh) -> bool:
    """bf16, a view that is not contiguous, a megabyte, and an empty send, in order."""
    sizes = [(3, 4), (256, 1024), (0, 4), (1, 4)]
    if mesh.is_first_stage:
        for index, (rows, cols) in enumerate(sizes):
            base = torch.full((cols, rows), float(index), dtype=torch.bfloat16)
            mesh.send_hidden(base.t())
        return True
    received = [mesh.recv_hidden(shape, torch.bfloat16) for shape in sizes]
    return all(
        tuple(x.shape) == shape and bool((x == index).all())
        for index, (x, shape) in enumerate(zip(received, sizes, strict=True))
    )


def test_sends_of_many_sizes() -> None:
    assert all(run(_sends_of_many_sizes, MeshLayout(pipeline_size=2)))


SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (101, 24),
    "q.weight": (36, 24),
    "q.bias": (36,),
    "o.weight": (24, 36),
    "o.bias": (24,),
    "up.weight": (50, 24),
    "down.weight": (24, 50),
}


def _layers(mesh: Mesh) -> dict[str, torch.Tensor]:
    """A toy model of every sharded layer: 9 query heads of 4, 50 channels, 101 tokens."""
    size, rank = mesh.layout.tensor_size, mesh.tensor_rank
    source = DummyWeights(SHAPES)
    vocab = vocab_shard(101, size, rank)
    weight = read_vocab_rows(source, "embed", vocab)
    hidden = VocabEmbedding(weight, vocab, mesh)(torch.arange(101))
    heads = head_shard(9, 3, size, rank)
    rows = range(heads.query.start * 4, heads.query.stop * 4)
    q = column_parallel(source, [("q", rows)], has_bias=True)
    o = row_parallel(source, "o", rows, has_bias=True, tensor_rank=rank)
    channels = intermediate_shard(50, size, rank)
    up = column_parallel(source, [("up", channels)], has_bias=False)
    down = row_parallel(source, "down", channels, has_bias=False, tensor_rank=rank)
    attended = mesh.all_reduce(o(q(hidden * 50)))
    output = mesh.all_reduce(down(up(attended * 50).relu()))
    return {
        "embedding": hidden,
        "attended": attended,
        "output": output,
        "logits": LMHead(weight, vocab, mesh)(hidden),
    }


@pytest.mark.parametrize("tensor_size", [2, 4])
def test_sharded_layers_equal_the_whole(tensor_size: int) -> None:
    """Uneven heads (3 on 2; 3 on 4), uneven channels and a padded vocabulary (101 rows)."""
    whole = _layers(Mesh())
    for parts in run(_layers_numpy, MeshLayout(tensor_size=tensor_size), num_kv_heads=3):
        for name, expected in whole.items():
            found = torch.from_numpy(parts[name])
            if name == "embedding":
                assert torch.equal(found, expected)
            else:  # sums in another order
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _layers_numpy(mesh: Mesh) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in _layers(mesh).items()}

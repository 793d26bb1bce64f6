"""Ranks map each other's GPU memory, all of them or none; which sums go there, and how."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public

from saqqara.workers.mesh.symmetric import UNMASKED, Gpu, SymmetricSum, join, why_not

BUFFER_BYTES = 8 * 1024 * 1024


class Ops:
    """Stands for torch's operators with one rank's part in the buffer: adds it to the input."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def one_shot_all_reduce_copy(
        self, shared: torch.Tensor, x: torch.Tensor, operation: str, group: str
    ) -> torch.Tensor:
        assert (operation, group, shared.shape, shared.dtype) == ("sum", "g", x.shape, x.dtype)
        self.called.append("one shot")
        return x * 2

    def two_shot_all_reduce_out(
        self, shared: torch.Tensor, operation: str, group: str, out: torch.Tensor
    ) -> None:
        assert (operation, group, shared.shape) == ("sum", "g", out.shape)
        self.called.append("two shots")
        out.copy_(shared * 2)


def joined(
    gpus: list[Gpu], maps: list[Callable[[], torch.Tensor]] | None = None
) -> list[tuple[SymmetricSum | None, str]]:
    """What each rank comes to; threads play them."""
    store, size = HashStore(), len(gpus)
    maps = maps or [lambda: torch.zeros(BUFFER_BYTES, dtype=torch.uint8)] * size
    with ThreadPoolExecutor(size) as pool:
        ends = [
            pool.submit(join, store, rank, size, gpus[rank], maps[rank], "g")
            for rank in range(size)
        ]
        return [end.result(timeout=60) for end in ends]


def test_all_ranks_of_one_host_take_part() -> None:
    for sums, why in joined([Gpu("a", 0), Gpu("a", 2), Gpu("a", 1)]):
        assert sums is not None
        assert why == "3 GPUs of one host map each other"


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [
        ([Gpu("a", 0), Gpu("b", 1)], "tensor rank 1 is on another host than tensor rank 0"),
        (
            [Gpu("a", 1), Gpu("a", 0), Gpu("a", 0)],
            "tensor ranks 1 and 2 both call their GPU cuda:0",
        ),
        ([Gpu("a", 0), Gpu("a", 1, "torch 2.3 has none")], "tensor rank 1: torch 2.3 has none"),
    ],
)
def test_what_keeps_ranks_from_it_is_told_to_all(gpus: list[Gpu], reason: str) -> None:
    def fail() -> torch.Tensor:
        raise AssertionError("nothing is mapped where somebody cannot take part")

    for sums, why in joined(gpus, [fail] * len(gpus)):
        assert sums is None
        assert why.startswith(reason)


def test_masked_gpus_are_told_what_ray_needs() -> None:
    why = why_not([Gpu("a", 0), Gpu("a", 0)])
    assert why is not None
    assert UNMASKED in why


def test_a_rank_whose_memory_is_not_mapped_keeps_all_from_it() -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("no peer access between 0 and 1\nmore lines")

    def works() -> torch.Tensor:
        return torch.zeros(BUFFER_BYTES, dtype=torch.uint8)

    for sums, why in joined([Gpu("a", 0), Gpu("a", 1)], [works, fail]):
        assert sums is None
        assert why == "tensor rank 1: no peer access between 0 and 1"


@pytest.mark.parametrize(
    ("rows", "num_ranks", "way"),
    [
        (64, 8, "two shots"),  # 1 MiB of 8,192 bf16 numbers each
        (16, 8, "one shot"),
        (64, 2, "one shot"),
        (512, 2, "one shot"),
        (33, 4, "two shots"),
        (32, 4, "one shot"),
    ],
)
def test_small_sums_take_one_shot(rows: int, num_ranks: int, way: str) -> None:
    ops = Ops()
    sums = SymmetricSum(torch.zeros(BUFFER_BYTES, dtype=torch.uint8), "g", num_ranks, ops)
    x = torch.randn(rows, 8192).bfloat16()
    assert sums.takes(x)
    total = sums.all_reduce(x)
    assert ops.called == [way]
    assert torch.equal(total, x * 2)
    assert total.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(513, 8192, dtype=torch.bfloat16),  # longer than the buffer
        torch.zeros(8, 64, dtype=torch.float16),  # no kernel adds these
        torch.zeros(3, 7, dtype=torch.bfloat16),  # not of whole vectors
        torch.zeros(64, 16).t(),
        torch.zeros(0, 64),
    ],
)
def test_other_sums_are_left_to_nccl(x: torch.Tensor) -> None:
    sums = SymmetricSum(torch.zeros(BUFFER_BYTES, dtype=torch.uint8), "g", 2, Ops())
    assert not sums.takes(x)


def test_torch_has_the_operators() -> None:
    """Their names and arguments, as this module calls them, are torch's."""
    shared: Any = torch.ops.symm_mem
    copy = shared.one_shot_all_reduce_copy.default._schema
    assert [a.name for a in copy.arguments] == [
        "symm_buffer",
        "local_input",
        "reduce_op",
        "group_name",
    ]
    two = shared.two_shot_all_reduce_out.default._schema
    assert [a.name for a in two.arguments] == ["input", "reduce_op", "group_name", "output"]

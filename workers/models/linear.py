"""Linear layers cut over tensor ranks, and how they are read from a checkpoint.

Column-parallel layers (q/k/v, gate/up) own output rows, row-parallel ones (o, down) own input
columns and leave the sum over ranks to the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from .weights import WeightSource


@dataclass(slots=True)
class Linear:
    """`x @ weight.T + bias`; weight [out, in], bias [out] or None.

    A merged layer (q/k/v, gate/up) is the concatenation of its parts' rows.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)

    @property
    def num_bytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


def column_parallel(
    source: WeightSource, parts: Sequence[tuple[str, range]], has_bias: bool
) -> Linear:
    """Read output rows of one or more layers and merge them into one.

    `parts` are (name without `.weight`, rows of this rank).
    """
    weight = source.read_joined([(f"{name}.weight", rows) for name, rows in parts])
    bias = None
    if has_bias:
        bias = source.read_joined([(f"{name}.bias", rows) for name, rows in parts])
    return Linear(weight, bias)


def row_parallel(
    source: WeightSource, name: str, columns: range, has_bias: bool, tensor_rank: int
) -> Linear:
    """Read input columns of one layer; its output is a part of a sum over the tensor ranks.

    Only tensor rank 0 holds the bias, so that the sum has it once.
    """
    weight = source.read(f"{name}.weight", cols=columns)
    return Linear(weight, source.read(f"{name}.bias") if has_bias and tensor_rank == 0 else None)


def reordered(qkv: Linear, num_heads: int, order: torch.Tensor | None) -> Linear:
    """The layer with the channels of its first heads (queries and keys) in another order.

    Args:
        qkv: weight [(num_heads + H) * D, E]; changed in place.
        num_heads: of queries and keys.
        order: int64 [D], as `channel_order` gives it; None: as they are.
    """
    if order is None:
        return qkv
    for tensor in (qkv.weight, qkv.bias):
        if tensor is not None:
            by_head = tensor[: num_heads * len(order)].view(num_heads, len(order), -1)
            by_head.copy_(by_head[:, order.to(tensor.device)])
    return qkv


def in_order(weight: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """A norm of heads, [D], in the same order."""
    return weight if order is None else weight[order.to(weight.device)]

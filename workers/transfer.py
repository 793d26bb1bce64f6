"""Between the host and the device, neither waiting for the other."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """The same numbers as a tensor on the device; on a CPU they share memory.

    Towards a GPU they go through page-locked memory: a copy from ordinary memory may wait for
    everything that the device has still to do.
    """
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """The same numbers in the host's own memory, for `to(device, non_blocking=True)` later.

    A GPU copies to page-locked memory when it gets there; only work on it may come behind that. On
    a CPU it is the tensor itself, which nobody else may write to.
    """
    if x.device.type != "cuda":
        return x.cpu()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


def page_locked_parts(num_items: int, item_bytes: int, most_bytes: int) -> list[int]:
    """So many items in parts that fill what torch hands out of page-locked memory: powers of two.

    In one part they could take twice the bytes that they have.

    Args:
        num_items: to be copied to the host.
        item_bytes: of each.
        most_bytes: of a part, a power of two; a part has one item at least.

    Returns:
        Items of each part, the largest first.
    """
    parts = []
    while most_bytes >= item_bytes:
        fitting = most_bytes // item_bytes
        parts += [fitting] * (num_items // fitting)
        num_items, most_bytes = num_items % fitting, most_bytes // 2
    return parts + [1] * num_items


@dataclass(frozen=True, slots=True)
class HostCopy:
    """Numbers on their way to the host, as they were when the copy was begun.

    Attributes:
        host: where they arrive.
        arrived: recorded behind the copy; None where they are there already.
    """

    host: Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def begin(cls, x: Tensor) -> "HostCopy":
        """Let the device copy a tensor when it gets there; on a CPU it is copied at once."""
        if x.device.type != "cuda":
            return cls(x.clone())
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(x.device))
        return cls(host, arrived)

    @property
    def has_arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return self.arrived is None or bool(self.arrived.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """The numbers on the host; waits for what the device did before the copy, no more."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host

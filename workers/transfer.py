"""From the host to the device without waiting for the device."""

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

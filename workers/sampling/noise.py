"""Counter-based random numbers: functions of (seed, position, token id), with nothing to save.

Shapes: S sampled rows, C candidates.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def noise_keys(seeds: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """One 64-bit key per (seed, position), int64 [S, 1]."""
    seed = np.array([seed & _MASK for seed in seeds], dtype=np.uint64)
    keys = _splitmix64(_splitmix64(seed) + np.array(positions, dtype=np.uint64))
    return torch.from_numpy(keys.view(np.int64))[:, None]


def mixed(x: torch.Tensor) -> torch.Tensor:
    """`_splitmix64` of int64 as if they were unsigned, on the tensor's device; same shape."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, fp64 [S, C], of keys int64 [S, 1] and token ids int64 [C] or [S, C].

    The generator is splitmix64 with the token id as its counter, on the tensors' device.
    """
    x = token_ids * _signed(0x9E3779B97F4A7C15) + keys
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shifted(x, 31)
    # Half a step away from 0 and 1, where the logarithms end.
    uniform = (_shifted(x, 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_()


def _signed(constant: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit constant."""
    return constant - (1 << 64) if constant >> 63 else constant


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

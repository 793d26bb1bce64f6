"""What the device knows of each slot's sequence, so that a step need not ask the host.

The tokens of a sequence are written here as they are sampled, and the next step reads them here.
How a slot is sampled lies beside them. Entry -1 belongs to no slot: padding reads token 0 there,
and what it samples goes there.

Shapes: S slots, N tokens of the longest sequence, T tokens of a step.
"""

import math

import numpy as np
import torch
from torch import Tensor

from saqqara.workers.plan import NewSequence
from saqqara.workers.transfer import to_device

TEMPERATURE, TOP_K, TOP_P, LOG_MIN_P = range(4)  # the columns of `filters`
_ALL_BITS = (1 << 64) - 1


class DeviceSlots:
    """Tokens and sampling settings by slot, on the device.

    Args:
        num_slots: slots of the worker, S.
        max_tokens: of a sequence, N.
        vocab_size: tokens of the model.
        device: where they live.

    Attributes:
        tokens: int32 [S + 1, N]; entries past what is known are stale.
        seeds: int64 [S + 1], the lowest 64 bits.
        filters: float64 [S + 1, 4]: temperature, top_k (the vocabulary where there is none), top_p
            (infinite) and the logarithm of min_p (minus infinity).
    """

    def __init__(
        self, num_slots: int, max_tokens: int, vocab_size: int, device: torch.device
    ) -> None:
        self.tokens = torch.zeros(num_slots + 1, max_tokens, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        nothing = torch.tensor([0.0, vocab_size, math.inf, -math.inf], dtype=torch.float64)
        self.filters = nothing.repeat(num_slots + 1, 1).to(device)
        self._vocab_size = vocab_size
        self._device = device

    def open(self, new: NewSequence) -> None:
        """Note a sequence that takes a slot: its known tokens, and how it is sampled."""
        spec, known = new.sampling, new.tokens().copy()
        self.tokens[new.slot, : len(known)].copy_(to_device(known, self._device))
        top_k = spec.top_k if 0 < spec.top_k < self._vocab_size else self._vocab_size
        top_p = spec.top_p if spec.top_p < 1 else math.inf
        log_min_p = math.log(spec.min_p) if spec.min_p > 0 else -math.inf
        filters = np.array([spec.temperature, top_k, top_p, log_min_p], dtype=np.float64)
        self.filters[new.slot].copy_(to_device(filters, self._device))
        seed = np.array([spec.seed & _ALL_BITS], dtype=np.uint64).view(np.int64)
        self.seeds[new.slot, None].copy_(to_device(seed, self._device))

    def feed(self, slots_T: Tensor, positions_T: Tensor) -> Tensor:
        """The tokens at these positions of these slots, int64 [T]; both are int64 [T]."""
        return self.tokens[slots_T, positions_T].long()

    def put(self, slots_T: Tensor, positions_T: Tensor, tokens_T: Tensor) -> None:
        """Write tokens, int64 [T], to these places."""
        self.tokens[slots_T, positions_T] = tokens_T.int()

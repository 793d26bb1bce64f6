"""How many sequences and prompt tokens go together, where the settings leave it open.

What a CPU can do is done by few sequences at once. A GPU reads its weights for 256 in the time of
one, and its products need thousands of tokens; but each slot has memory of its own, which is taken
from the pool, and so do the temporaries of a group of prompts.
"""

from dataclasses import dataclass
from typing import Protocol

GIB = 2**30
LARGE_GPU_BYTES = 70 * GIB  # the 80 GB class and above
_SLOT_SHARE = 0.05  # of a GPU's memory, for what its slots remember


class Limited(Protocol):
    """What has such limits."""

    @property
    def max_num_seqs(self) -> int:
        """Slots."""

    @property
    def max_prefill_tokens(self) -> int:
        """Prompt tokens of one prefill group."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Of one rank.

    Attributes:
        max_num_seqs: slots.
        max_prefill_tokens: prompt tokens of one prefill group.
    """

    max_num_seqs: int
    max_prefill_tokens: int


ON_CPU = StepLimits(64, 2048)
ON_GPU = StepLimits(128, 4096)
ON_LARGE_GPU = StepLimits(256, 8192)
OPEN = ("max_num_seqs", "max_prefill_tokens")  # the settings that a device may decide


def step_limits(device: str, device_bytes: int, slot_bytes: int) -> StepLimits:
    """The limits of a device.

    Args:
        device: such as `cpu` or `cuda:0`.
        device_bytes: of a GPU's memory.
        slot_bytes: what a slot remembers for decode stages. Slots are fewer where all of them would
            take more than a twentieth of the memory, but not fewer than on a CPU.
    """
    if not device.startswith("cuda"):
        return ON_CPU
    limits = ON_LARGE_GPU if device_bytes >= LARGE_GPU_BYTES else ON_GPU
    fitting = int(_SLOT_SHARE * device_bytes) // max(1, slot_bytes)
    slots = max(ON_CPU.max_num_seqs, min(limits.max_num_seqs, fitting))
    return StepLimits(slots, limits.max_prefill_tokens)

"""Rotary position embedding in the half-rotation layout of Hugging Face.

Shapes: T packed tokens, H heads, D head_dim.
"""

import math

import torch

from .reading.rope_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Angle per position and pair of channels, fp32 [D/2]; as `transformers` computes it."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (rope.theta ** (channels / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Long waves divided by `factor`, short ones kept, a linear blend between."""
    length = rope.original_max_position
    waves = 2 * math.pi / frequencies
    blend = (length / waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    is_long = waves > length / rope.low_freq_factor
    is_short = waves < length / rope.high_freq_factor
    kept = torch.where(is_short, frequencies, blended)
    return torch.where(is_long, frequencies / rope.factor, kept)


class RotaryTable:
    """Cosines and sines of all positions, fp32 [max_position, D/2] each.

    The rotation is computed in fp32 whatever the dtype of queries and keys.

    Look up once per step, rotate in every layer:
    `cos, sin = table.lookup(positions); q = rotate(q, cos, sin)`.
    """

    def __init__(
        self,
        rope: RopeSpec,
        head_dim: int,
        max_position: int,
        device: torch.device | str = "cpu",
    ) -> None:
        positions = torch.arange(max_position, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies(rope, head_dim)
        self.cos = angles.cos().to(device)
        self.sin = angles.sin().to(device)

    @property
    def num_bytes(self) -> int:
        """Bytes of cosines and sines."""
        return self.cos.nbytes + self.sin.nbytes

    def lookup(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of `rotate` for positions int64 [T]: (cos, cos) and (-sin, sin), [T, 1, D]."""
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, H, D] by looked-up angles, in fp32; a new contiguous tensor, dtype as `x`.

    With x = (a, b) in halves: `(a, b) * (cos, cos) + (b, a) * (-sin, sin)`.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype).contiguous()

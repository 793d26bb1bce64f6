"""Rotary position embedding in the half-rotation layout of Hugging Face.

A head that rotates a share of its channels has them in another order here (`channel_order`), so
that pairs lie half a head apart as ever, and those that are not rotated have frequency 0.

Shapes: T packed tokens, H heads, D head_dim, R channels of a head that are rotated.
"""

import math

import torch
from torch import Tensor

from .reading.rope_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int, max_model_len: int = 0) -> Tensor:
    """Angle per position and pair of channels, fp32 [D/2]; as `transformers` computes it.

    What depends on a text's length there (`dynamic`, `longrope`) depends on `max_model_len` here,
    so that keys of all lengths belong together.
    """
    frequencies = torch.zeros(head_dim // 2)
    if rope.kind != "none":
        of_rotated = _scaled(rope, rope.rotary_size(head_dim), max_model_len)
        frequencies[: len(of_rotated)] = of_rotated
    return frequencies


def length_note(rope: RopeSpec, max_model_len: int) -> str | None:
    """What `max_model_len` decides about frequencies, for the log; None: nothing."""
    original = rope.original_max_position
    if rope.kind == "longrope":
        kind = "long" if max_model_len > original else "short"
        return (
            f"longrope: {kind} factors for all texts, since max_model_len={max_model_len} and the "
            f"model's original length is {original}"
        )
    if rope.kind == "dynamic":
        means = "scaled to it" if max_model_len > original else "not scaled"
        return (
            f"dynamic rope: frequencies {means} for all texts, since "
            f"max_model_len={max_model_len} and the model's original length is {original}"
        )
    return None


def channel_order(rope: RopeSpec, head_dim: int) -> Tensor | None:
    """By place, which channel of a checkpoint's head lies there, int64 [D]; None: as they are.

    The checkpoint rotates channel i < R/2 with i + R/2; here such pairs are i and i + D/2.
    """
    size = rope.rotary_size(head_dim)
    if size == head_dim:
        return None
    rest = torch.arange(size, head_dim)
    first, second = rest.chunk(2)
    low, high = torch.arange(size // 2), torch.arange(size // 2, size)
    return torch.cat((low, first, high, second))


def _scaled(rope: RopeSpec, size: int, max_model_len: int) -> Tensor:
    """Frequencies of R channels, fp32 [R/2]."""
    theta = rope.theta
    if rope.kind == "dynamic" and max_model_len > rope.original_max_position:
        stretch = rope.factor * max_model_len / rope.original_max_position - (rope.factor - 1)
        theta *= stretch ** (size / (size - 2))
    channels = torch.arange(0, size, 2, dtype=torch.int64).float()
    waves = theta ** (channels / size)  # positions per radian
    frequencies = 1.0 / waves
    match rope.kind:
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(frequencies, rope)
        case "yarn":
            return _yarn(waves, rope, size)
        case "longrope":
            is_long = max_model_len > rope.original_max_position
            return 1.0 / (
                torch.tensor(rope.long_factors if is_long else rope.short_factors) * waves
            )
        case _:
            return frequencies


def _llama3(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    """Long waves divided by `factor`, short ones kept, a linear blend between."""
    length = rope.original_max_position
    waves = 2 * math.pi / frequencies
    blend = (length / waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    is_long = waves > length / rope.low_freq_factor
    is_short = waves < length / rope.high_freq_factor
    kept = torch.where(is_short, frequencies, blended)
    return torch.where(is_long, frequencies / rope.factor, kept)


def _yarn(waves: Tensor, rope: RopeSpec, size: int) -> Tensor:
    """NTK by parts (YaRN, 2309.00071, section 3.2): a ramp over channels between two bounds."""

    def channel(rotations: float) -> float:
        """Which channel turns so often over the original length."""
        ratio = rope.original_max_position / (rotations * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(size // 2).float() - low) / width).clamp(0, 1)
    kept = 1 - stretched
    return 1.0 / (rope.factor * waves) * (1 - kept) + 1.0 / waves * kept


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
        angles = positions[:, None] * inverse_frequencies(rope, head_dim, max_position)
        cos, sin = angles.cos(), angles.sin()
        if rope.attention_factor != 1:
            cos[:, : rope.rotary_size(head_dim) // 2] *= rope.attention_factor
            sin *= rope.attention_factor
        self.cos, self.sin = cos.to(device), sin.to(device)

    @property
    def num_bytes(self) -> int:
        """Bytes of cosines and sines."""
        return self.cos.nbytes + self.sin.nbytes

    def lookup(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of `rotate` for positions int64 [T]: (cos, cos) and (-sin, sin), [T, 1, D]."""
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by looked-up angles, in fp32; a new contiguous tensor, dtype as `x`.

    With x = (a, b) in halves: `(a, b) * (cos, cos) + (b, a) * (-sin, sin)`.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype).contiguous()

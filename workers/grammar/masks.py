"""Masks of allowed tokens, and how they act on logits.

Shapes: S rows of logits, R of them with a mask, V vocabulary, W 32-bit words of a mask.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.transfer import to_device


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """The tokens that grammars allow in some rows of a batch.

    Attributes:
        rows: which rows, ascending.
        words: int32 [R, W]; bit t % 32 of word t // 32 is set where token t is allowed.
    """

    rows: tuple[int, ...]
    words: NDArray[np.int32]

    @classmethod
    def only(cls, token_id: int, vocab_size: int) -> "TokenMasks":
        """The mask of a batch of one row that leaves one token."""
        words = np.zeros((1, -(-vocab_size // 32)), dtype=np.uint32)
        words[0, token_id // 32] = 1 << (token_id % 32)
        return cls((0,), words.view(np.int32))

    def of(self, row: int) -> "TokenMasks | None":
        """The mask of one row as that of a batch of its own; None where the row has none."""
        if row not in self.rows:
            return None
        place = self.rows.index(row)
        return TokenMasks((0,), self.words[place : place + 1])

    def apply(self, logits: Tensor) -> Tensor:
        """The logits [S, V], -inf where a mask does not allow the token; the given ones stay."""
        if len(self.rows) == len(logits):
            return torch.where(self._allowed(logits), logits, -torch.inf)
        out = logits.clone()
        rows = to_device(np.array(self.rows, dtype=np.int64), logits.device)
        out[rows] = torch.where(self._allowed(logits), logits[rows], -torch.inf)
        return out

    def _allowed(self, logits: Tensor) -> Tensor:
        """The masks as bool [R, V]; to a GPU they travel as bits."""
        octets = self.words.view(np.uint8)
        vocab_size = logits.shape[1]
        if logits.device.type == "cpu":
            bits = np.unpackbits(octets, axis=1, count=vocab_size, bitorder="little")
            return torch.from_numpy(bits.view(np.bool_))
        return unpack(to_device(octets, logits.device), vocab_size)


def unpack(octets: Tensor, vocab_size: int) -> Tensor:
    """Bits, the lowest of each byte first, as bool [R, V]; `octets` are uint8 [R, 4 W]."""
    places = torch.arange(8, dtype=torch.uint8, device=octets.device)
    bits = (octets[:, :, None] >> places) & 1
    return bits.flatten(1)[:, :vocab_size].bool()

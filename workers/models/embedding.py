"""The two ends of the model, both cut by vocabulary rows: token embedding and LM head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding, linear

from saqqara.workers.mesh.layout import VocabShard
from saqqara.workers.mesh.mesh import Mesh

from .weights import WeightSource


def read_vocab_rows(source: WeightSource, name: str, shard: VocabShard) -> torch.Tensor:
    """The rows of one rank, [size, E]; rows beyond the vocabulary are zeros."""
    return source.read(name, rows=range(shard.start, shard.stop), pad_rows_to=shard.size)


@dataclass(slots=True)
class VocabEmbedding:
    """Token embedding; weight [size, E] holds the rows of `shard`. If `tied` it is the head's."""

    weight: torch.Tensor
    shard: VocabShard
    mesh: Mesh
    tied: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight, where it is not the head's."""
        return 0 if self.tied else self.weight.nbytes

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] -> hidden states [T, E], the same on all tensor ranks."""
        if self.mesh.layout.tensor_size == 1:
            return embedding(token_ids, self.weight)
        foreign = (token_ids < self.shard.start) | (token_ids >= self.shard.stop)
        local = (token_ids - self.shard.start).masked_fill_(foreign, 0)
        hidden = embedding(local, self.weight).masked_fill_(foreign[:, None], 0)
        return self.mesh.all_reduce(hidden)


@dataclass(frozen=True, slots=True)
class ScaledEmbedding:
    """An embedding whose hidden states are multiplied by a factor, rounded to their dtype."""

    embedding: Callable[[torch.Tensor], torch.Tensor]
    factor: float
    num_bytes: int

    @classmethod
    def of(cls, embedding: Any, factor: float, dtype: torch.dtype) -> "ScaledEmbedding":
        """That embedding, scaled; the factor is rounded as transformers rounds it."""
        return cls(embedding, float(torch.tensor(factor).to(dtype)), embedding.num_bytes)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] -> hidden states [T, E]."""
        return self.embedding(token_ids).mul_(self.factor)


@dataclass(slots=True)
class LMHead:
    """Logits of the whole vocabulary; weight [size, E] is the embedding's own when tied."""

    weight: torch.Tensor
    shard: VocabShard
    mesh: Mesh

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, E] -> logits fp32 [S, vocab_size] on every tensor rank."""
        logits = self.mesh.all_gather_last(linear(hidden, self.weight))
        return logits[..., : self.shard.vocab_size].float()

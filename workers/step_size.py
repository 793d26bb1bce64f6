"""How much GPU memory a step takes besides weights and pages, by running its largest part."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from .attention.base import CuSeqlens
from .models.decoder import chunks

if TYPE_CHECKING:
    from .shard import Shard

_WINDOW_QUERIES = 64


@torch.inference_mode()
def measure_step(shard: "Shard") -> int:
    """Peak GPU bytes of the largest step: one layer of a full prefill group, and the head."""
    tokens, config, spec = shard.config.max_prefill_tokens, shard.config, shard.spec
    torch.cuda.synchronize(shard.device)
    before = torch.cuda.memory_allocated(shard.device)
    torch.cuda.reset_peak_memory_stats(shard.device)
    hidden = torch.zeros(tokens, spec.hidden_size, dtype=shard.dtype, device=shard.device)
    length = min(tokens, shard.max_model_len)
    lengths = [length] * (tokens // length) + ([tokens % length] if tokens % length else [])
    places = shard.decoder.places(shard.to_device(np.arange(tokens) % length))
    cu = CuSeqlens.of(lengths, shard.device)
    layer = shard.decoder.layers[0]
    q, k, v = layer.project(hidden, places)
    attended, lse = shard.backend.prefill(q, k, v, cu, cu, shard.scale)
    window = slice(max(length - _WINDOW_QUERIES, 0), length)
    window_lse = None if lse is None else lse[window]
    shard.backend.mass(q[window], k[:length], shard.scale, lse=window_lse)
    for chunk in chunks(tokens, config.linear_chunk_tokens):
        layer.finish(hidden[chunk], attended[chunk])
    if shard.decoder.head is not None:
        shard.decoder.logits(hidden[: config.max_num_seqs])
    peak = torch.cuda.max_memory_allocated(shard.device)
    # Another group's hidden states may be parked beside the one in work.
    return int(peak - before + 2 * hidden.nbytes)

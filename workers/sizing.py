"""What a part needs of memory besides its weights, and how many pages the rest holds.

Shapes: T packed tokens, E hidden size.
"""

import numpy as np
import torch

from saqqara.compression.decode import DecodeStage
from saqqara.compression.growth import (
    most_ring_size,
    remembers_normalisers,
    sums_mass,
)
from saqqara.compression.retention import Retention

from .attention.base import CuSeqlens
from .host_memory import available_bytes, total_bytes
from .models.decoder import chunks
from .part import Part
from .transfer import to_device

GIB = 1024**3
NORMALISER_BYTES = 4  # float32

_CPU_SHARE = 0.3
_CPU_MAX_BYTES = 4 * GIB
_WINDOW_QUERIES = 64
_LARGEST_GRAPH = 512
_WORKSPACE_BYTES = 64 << 20  # cuBLAS's and cuBLASLt's of the recording stream, 32 MiB each at most
_KERNEL_BYTES = 8 << 10  # of a recorded kernel in the driver, and this many kernels in a layer
_LAYER_KERNELS = 20


def pool_pages(part: Part) -> int:
    """Pages of one worker's pool.

    `kv_memory_gib` is per replica and is split over its workers by their rows; without it a GPU
    gives what `memory_utilization` leaves after weights and one step, a CPU min(4 GiB, 30% of what
    is available) per replica.

    Raises:
        ValueError: not even one full-length sequence's rows would get a page each, or the pool is
            larger than the machine's memory.
    """
    config, device, rows = part.config, part.device, part.num_rows
    page_bytes = config.page_tokens * part.spec.kv_bytes_per_row_token(part.dtype)
    # Also where the pool has a given size: it does the first step's work, and shows that it fits.
    step_bytes = 0
    if device.type == "cuda":
        step_bytes = measure_step(part) + graph_bytes(part) + rings_and_sums_bytes(part)
    if config.kv_memory_gib is not None:
        pool_bytes = config.kv_memory_gib * GIB * rows / part.replica_rows
    elif device.type == "cuda":
        torch.cuda.empty_cache()  # what loading and the measured step left behind is free, too
        free, total = torch.cuda.mem_get_info(device)
        pool_bytes = free - (1 - config.memory_utilization) * total - step_bytes
    else:
        most_bytes = min(_CPU_MAX_BYTES, _CPU_SHARE * available_bytes())
        pool_bytes = most_bytes * rows / part.replica_rows
    most = config.max_num_seqs * rows * -(-part.max_model_len // config.page_tokens)
    pages = min(int(pool_bytes // page_bytes), most)
    if device.type == "cpu" and pages * page_bytes > total_bytes():
        raise ValueError(
            f"kv_memory_gib={config.kv_memory_gib:g}: this worker's {pages} pages would take "
            f"{pages * page_bytes / GIB:.1f} GiB; the machine has {total_bytes() / GIB:.1f} GiB"
        )
    if pages < rows:
        raise ValueError(
            f"kv_memory_gib: {max(pool_bytes, 0) / GIB:.4f} GiB holds {pages} pages on this worker,"
            f" fewer than one per row ({rows} layers x kv heads); it needs more memory"
        )
    return pages


@torch.inference_mode()
def measure_step(part: Part) -> int:
    """Peak GPU bytes of the largest step: one layer of a full prefill group, and the head."""
    tokens, config, spec = part.config.max_prefill_tokens, part.config, part.spec
    torch.cuda.synchronize(part.device)
    before = torch.cuda.memory_allocated(part.device)
    torch.cuda.reset_peak_memory_stats(part.device)
    hidden_TE = torch.zeros(tokens, spec.hidden_size, dtype=part.dtype, device=part.device)
    length = min(tokens, part.max_model_len)
    lengths = [length] * (tokens // length) + ([tokens % length] if tokens % length else [])
    places = part.decoder.places(to_device(np.arange(tokens) % length, part.device))
    cu = CuSeqlens.of(lengths, part.device)
    layer = part.decoder.layers[0]
    q, k, v = layer.project(hidden_TE, places)
    attended, lse = part.backend.prefill(q, k, v, cu, cu, part.scale)
    window = slice(max(length - _WINDOW_QUERIES, 0), length)
    window_lse = None if lse is None else lse[window]
    part.backend.mass(q[window], k[:length], part.scale, lse=window_lse)
    for chunk in chunks(tokens, config.linear_chunk_tokens):
        layer.finish(hidden_TE[chunk], attended[chunk])
    if part.decoder.head is not None:
        part.decoder.logits(hidden_TE[: config.max_num_seqs])
    peak = torch.cuda.max_memory_allocated(part.device)
    # Another group's hidden states may be parked beside the one in work.
    return int(peak - before + 2 * hidden_TE.nbytes)


def rings_and_sums_bytes(part: Part) -> int:
    """Bytes of every slot's ring and sums under the engine's own retention."""
    config, max_tokens = part.config, part.max_model_len
    retention = Retention.parse(config.retention, config.budget)
    query_bytes = ring_query_bytes(part)
    if remembers_normalisers(retention):
        query_bytes += ring_normaliser_bytes(part)
    slot_bytes = most_ring_size(retention, max_tokens) * query_bytes
    if sums_mass(retention):
        assert isinstance(retention.decode, DecodeStage)
        rows = retention.row_tokens(max_tokens, part.spec.num_layers, part.spec.num_kv_heads)
        slack = retention.decode.slack_pages * config.page_tokens
        slot_bytes += 4 * part.num_rows * (int(rows.max()) + slack)
    return config.max_num_seqs * slot_bytes


def ring_query_bytes(part: Part) -> int:
    """Bytes of a query that a ring remembers, in all layers."""
    return len(part.layers) * len(part.heads.query) * part.spec.head_dim * part.dtype.itemsize


def ring_normaliser_bytes(part: Part) -> int:
    """Bytes of a query's normalisers, in all layers."""
    return len(part.layers) * len(part.heads.query) * NORMALISER_BYTES


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to record graphs for: fine steps where padding costs most, then coarser ones."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, _LARGEST_GRAPH + 1, 64)]
    top = min(max_num_seqs, _LARGEST_GRAPH)
    return (*(size for size in sizes if size < top), top)


def why_no_graphs(part: Part) -> str | None:
    """Why decode steps are launched by the host, or None if they are recorded."""
    if part.mesh.layout.world_size > 1:
        return "ranks exchange data in every layer"
    if part.device.type != "cuda":
        return f"the device is {part.device.type}"
    return "cuda_graphs='off'" if part.config.cuda_graphs == "off" else None


def graph_bytes(part: Part) -> int:
    """Bytes that the graphs of a rank will hold, which its page pool must leave; 0 without graphs.

    What the driver keeps of each kernel is an allowance; the start-up log says what was taken.
    """
    if part.backend.name != "triton" or why_no_graphs(part) is not None:
        return 0
    sizes = graph_sizes(part.config.max_num_seqs)
    hidden_bytes = part.spec.hidden_size * part.dtype.itemsize
    kernels = len(sizes) * len(part.layers) * _LAYER_KERNELS
    scratch = sizes[-1] * scratch_bytes(part)
    return scratch + sum(sizes) * hidden_bytes + kernels * _KERNEL_BYTES + _WORKSPACE_BYTES


def scratch_bytes(part: Part) -> int:
    """Bytes of the temporaries of one decoded token; layers use the same memory in turn."""
    from saqqara.workers.kernels.decode import MAX_SPLITS, SPLIT_TOKENS

    spec, itemsize = part.spec, part.dtype.itemsize
    num_queries, dim = len(part.heads.query), spec.head_dim
    num_all = num_queries + 2 * len(part.heads.kv)
    per_layer = part.decoder.layers[0].activation_bytes_per_token(itemsize)
    # Queries and keys are rotated in float32: the product, the rotated halves, the sum.
    rotation = num_all * dim * (2 * itemsize + 2 * 4)
    splits = num_queries * (dim + 1) * 4 * MAX_SPLITS
    if part.max_model_len <= SPLIT_TOKENS:
        splits = 0
    attention = (2 * num_queries * dim + spec.hidden_size) * itemsize + splits
    angles = 4 * dim * 4
    return max(per_layer, rotation + num_all * dim * itemsize, attention + rotation) + angles

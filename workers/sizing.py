"""What a part needs of memory besides its weights, and how many pages the rest holds.

Shapes: T packed tokens, E hidden size.
"""

import numpy as np
import torch

from saqqara.compression.growth import most_ring_size, remembers_normalisers
from saqqara.compression.retention import Retention

from .attention.base import CuSeqlens
from .footprint import GIB, graph_sizes, stage_layers
from .host_memory import available_bytes, total_bytes
from .models.decoder import chunks
from .part import Part
from .transfer import to_device

_CPU_SHARE = 0.3
_CPU_MAX_BYTES = 4 * GIB
_WINDOW_QUERIES = 64
SAMPLED_ROWS = 32  # at a time, on the device


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
    page_bytes = part.footprint.page_bytes(config.page_tokens)
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
    sizes = (config.max_num_seqs, part.max_model_len, config.page_tokens)
    pages = part.footprint.pages_within(pool_bytes, *sizes)
    if device.type == "cpu" and pages * page_bytes > total_bytes():
        raise ValueError(
            f"kv_memory_gib={config.kv_memory_gib:g}: this worker's {pages} pages would take "
            f"{pages * page_bytes / GIB:.1f} GiB; the machine has {total_bytes() / GIB:.1f} GiB"
        )
    if pages < rows:
        raise ValueError(
            f"kv_memory_gib: {max(pool_bytes, 0) / GIB:.4f} GiB holds {pages} pages on this worker,"
            f" fewer than one per row ({rows} layers x kv heads); it needs more memory"
            f"{_even_split(part)}"
        )
    return pages


def _even_split(part: Part) -> str:
    """What else may help where stages were balanced by what their layers keep."""
    stages = part.mesh.layout.pipeline_size
    even = stage_layers(part.spec, stages)
    if (
        part.config.layer_split is not None
        or even[part.mesh.layout.pipeline_rank(part.mesh.rank)] == part.layers
    ):
        return ""
    return f", or layer_split: [{', '.join(str(len(stage)) for stage in even)}]"


def measure_step(part: Part) -> int:
    """Peak GPU bytes of the largest step: one layer of a full prefill group, and the head."""
    torch.cuda.synchronize(part.device)
    before = torch.cuda.memory_allocated(part.device)
    torch.cuda.reset_peak_memory_stats(part.device)
    hidden_bytes = largest_step(part)
    peak = torch.cuda.max_memory_allocated(part.device)
    # Another group's hidden states may be parked beside the one in work.
    return int(peak - before + 2 * hidden_bytes)


@torch.inference_mode()
def largest_step(part: Part) -> int:
    """Compute what takes most memory, with zeros; returns the bytes of its hidden states."""
    tokens, config, spec = part.config.max_prefill_tokens, part.config, part.spec
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
    return hidden_TE.nbytes


def rings_and_sums_bytes(part: Part) -> int:
    """Bytes of every slot's ring and sums under the engine's own retention."""
    config = part.config
    retention = Retention.parse(config.retention, config.budget)
    sizes = (config.max_num_seqs, part.max_model_len, config.page_tokens)
    return part.footprint.rings_and_sums_bytes(retention, *sizes)


def why_no_graphs(part: Part) -> str | None:
    """Why decode steps are launched by the host, or None if they are recorded."""
    if part.choices.linear_backend != "triton":
        return f"linear layers are {part.choices.linear_backend}'s"
    if part.device.type != "cuda":
        return f"the device is {part.device.type}"
    return "cuda_graphs='off'" if part.config.cuda_graphs == "off" else None


def graph_bytes(part: Part) -> int:
    """Bytes that the graphs of a rank will hold, which its page pool must leave; 0 without graphs.

    What the driver keeps of each kernel is an allowance; the start-up log says what was taken.
    """
    if not part.samples_on_device or why_no_graphs(part) is not None:
        return 0
    largest = graph_sizes(part.config.max_num_seqs)[-1]
    recorded = part.footprint.recorded_bytes(part.config.max_num_seqs)
    queries, normalisers = noted_in_steps(part)
    of_heads = len(part.layers) * len(part.heads.query)
    noted = of_heads * (queries * part.spec.head_dim * part.dtype.itemsize + normalisers * 4)
    recorded *= 1 + queries  # steps that note something, and those that do not
    return largest * (scratch_bytes(part) + noted) + recorded + sampler_bytes(part)


def noted_in_steps(part: Part) -> tuple[bool, bool]:
    """Whether the engine's own retention remembers queries while decoding, and normalisers."""
    retention = Retention.parse(part.config.retention, part.config.budget)
    return most_ring_size(retention, part.max_model_len) > 0, remembers_normalisers(retention)


def sampler_bytes(part: Part) -> int:
    """Bytes of the tokens that stay on the device, and of the largest recorded sampling step."""
    config, vocab_size = part.config, part.spec.vocab_size
    tokens = (config.max_num_seqs + 1) * (part.max_model_len + 1) * 4  # int32
    if part.decoder.head is None:
        return tokens
    largest = graph_sizes(config.max_num_seqs)[-1]
    logits = largest * vocab_size * (4 + part.dtype.itemsize)  # as multiplied, and in float32
    # Values, ids, weights, running sums and noise of a row, most of them of 8 bytes.
    return tokens + logits + min(largest, SAMPLED_ROWS) * vocab_size * 12 * 8


def scratch_bytes(part: Part) -> int:
    """Bytes of the temporaries of one decoded token; layers use the same memory in turn."""
    from saqqara.workers.kernels.work import MAX_SPLITS, SPLIT_TOKENS, most_splits

    spec, itemsize = part.spec, part.dtype.itemsize
    num_queries, num_kv, dim = len(part.heads.query), len(part.heads.kv), spec.head_dim
    attended = num_queries * dim * itemsize
    # Also of the layer before, until this one's are there: the fused projection, the output.
    held = (spec.hidden_size + (num_queries + 2 * num_kv) * dim) * itemsize + attended
    splits = most_splits(part.max_model_len, SPLIT_TOKENS)
    if splits > 1:
        attended += num_queries * (dim + 1) * 4 * MAX_SPLITS  # float32
        held += part.num_rows * splits * 4  # the list of all parts, int32
    return held + max(part.decoder.layers[0].activation_bytes_per_token(itemsize), attended)

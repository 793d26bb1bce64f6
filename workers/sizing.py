"""What a part needs of memory besides its weights, and how many pages the rest holds.

Shapes: T packed tokens, E hidden size.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from saqqara.compression.growth import most_ring_size, remembers_normalisers
from saqqara.compression.retention import Retention

from .attention.base import CuSeqlens
from .footprint import GIB, stage_layers
from .host_memory import available_bytes, available_owner, total_bytes, total_owner
from .models.decoder import chunks
from .part import Part
from .transfer import to_device

logger = logging.getLogger(__name__)

_CPU_SHARE = 0.3
_CPU_MAX_BYTES = 4 * GIB
_WINDOW_QUERIES = 64
_HOST_BYTES_PER_GPU = 4 * GIB
_HOST_SHARE = 0.3  # of what is available, if the replica's ranks are all on this machine


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a rank holds from start-up on, and what it leaves free for its steps; in bytes.

    Attributes:
        num_pages: of the pool.
        pool_bytes: of the pages.
        table_bytes: of page tables, lengths, rotary angles, and what the device knows of slots
            where it samples.
        temporary_bytes: of the largest step, prefill or sampling; 0 on a CPU, where none is set
            aside. So are the others:
        graph_bytes: of recorded decode steps.
        remembered_bytes: of every slot's ring and sums under the engine's own retention.
        host_kv_bytes: of the host's memory, for parked sequences; none is taken before one comes.
    """

    num_pages: int
    pool_bytes: int
    table_bytes: int
    temporary_bytes: int = 0
    graph_bytes: int = 0
    remembered_bytes: int = 0
    host_kv_bytes: int = 0


def size_pool(part: Part) -> Holdings:
    """What a worker will hold beside its weights, and how many pages are left for its pool.

    `kv_memory_gib` is per replica and is split over its workers by their rows; without it a GPU
    gives what `memory_utilization` leaves after everything else that it will hold, a CPU min(4 GiB,
    30% of what is available) per replica. On a CPU `host_kv_gib` is part of that: parked sequences
    take it from the pool. Without it they have min(4 GiB, the rank's share of 30% of what is
    available) beside each GPU, and nothing on a CPU.

    Raises:
        ValueError: not even one full-length sequence's rows would get a page each, or the pool, or
            `host_kv_gib`, is larger than the machine's memory.
    """
    config, device, rows, footprint = part.config, part.device, part.num_rows, part.footprint
    page_bytes, is_host = footprint.page_bytes(config.page_tokens), device.type == "cpu"
    # Also where the pool has a given size: it does the first step's work, and shows that it fits.
    aside = (0, 0, 0) if is_host else _set_aside(part)
    slots = footprint.slot_bytes(*part.sizes[:2]) if part.samples_on_device else 0
    host_bytes = host_kv_bytes(part)
    taken = host_bytes if is_host else 0
    if config.kv_memory_gib is not None:
        pool_bytes = config.kv_memory_gib * GIB * rows / part.replica_rows - taken
        pages = footprint.pages_within(pool_bytes, *part.sizes)
    elif is_host:
        available = available_bytes()
        most_bytes = min(_CPU_MAX_BYTES, _CPU_SHARE * available)
        logger.info(
            "the replica's pool: at most %.2f GiB, of %.2f GiB that %s leaves",
            *(most_bytes / GIB, available / GIB, available_owner()),
        )
        pool_bytes = most_bytes * rows / part.replica_rows - taken
        pages = footprint.pages_within(pool_bytes, *part.sizes)
    else:
        free, total = device_memory(device)
        pool_bytes = free - (1 - config.memory_utilization) * total - sum(aside) - slots
        pages = footprint.pages_within(pool_bytes, *part.sizes, with_mirror=True)
    if is_host and pages * page_bytes > total_bytes():
        raise ValueError(
            f"kv_memory_gib={config.kv_memory_gib:g}: this worker's {pages} pages would take "
            f"{pages * page_bytes / GIB:.1f} GiB; {total_owner()} has "
            f"{total_bytes() / GIB:.1f} GiB"
        )
    if pages < rows:
        raise ValueError(
            f"kv_memory_gib: {max(pool_bytes, 0) / GIB:.4f} GiB holds {pages} pages on this worker,"
            f" fewer than one per row ({rows} layers x kv heads); it needs more memory"
            f"{_even_split(part)}{', or a smaller host_kv_gib' if taken else ''}"
        )
    tables = footprint.table_bytes(*part.sizes, mirrored_pages=None if is_host else pages)
    tables += footprint.rotary_bytes(part.max_model_len) + slots
    return Holdings(pages, pages * page_bytes, tables, *aside, host_bytes)


def host_kv_bytes(part: Part) -> int:
    """Bytes of the host's memory in which this rank may keep parked sequences."""
    gib = part.config.host_kv_gib
    if gib is None:
        if part.device.type == "cpu":
            return 0
        available = _HOST_SHARE * available_bytes() / part.mesh.layout.world_size
        return min(_HOST_BYTES_PER_GPU, int(available))
    num_bytes = int(gib * GIB * part.num_rows / part.replica_rows)
    if num_bytes > total_bytes():
        raise ValueError(
            f"host_kv_gib={gib:g}: this worker's part would take {num_bytes / GIB:.1f} GiB; "
            f"{total_owner()} has {total_bytes() / GIB:.1f} GiB"
        )
    return num_bytes


def _set_aside(part: Part) -> tuple[int, int, int]:
    """Bytes that a GPU's pool leaves free: of a step's temporaries, of graphs, of rings and sums.

    Prefill and sampling do not overlap; two groups' hidden states may be parked beside either.
    """
    sampling = part.footprint.sampler_bytes(
        part.config.max_num_seqs, part.max_model_len, on_device=part.samples_on_device
    )
    hidden_bytes = part.config.max_prefill_tokens * part.spec.hidden_size * part.dtype.itemsize
    temporary = max(measure_step(part), sampling + 3 * hidden_bytes)
    return temporary, graph_bytes(part), rings_and_sums_bytes(part)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free on a GPU, and all of its bytes."""
    torch.cuda.empty_cache()  # what loading and the measured step left behind is free, too
    free, total = torch.cuda.mem_get_info(device)
    return free, total


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
    hidden_bytes = 0

    def work() -> None:
        nonlocal hidden_bytes
        hidden_bytes = largest_step(part)

    peak = peak_bytes(part.device, work)
    # Another group's hidden states may be parked beside the one in work.
    return peak + 2 * hidden_bytes


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The most bytes of a GPU that some work holds at once beyond what was held before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return int(torch.cuda.max_memory_allocated(device) - before)


@torch.inference_mode()
def largest_step(part: Part) -> int:
    """Compute what takes most memory, with zeros; returns the bytes of its hidden states."""
    tokens, config, spec = part.config.max_prefill_tokens, part.config, part.spec
    hidden_TE = torch.zeros(tokens, spec.hidden_size, dtype=part.dtype, device=part.device)
    length = min(tokens, part.max_model_len)
    lengths = [length] * (tokens // length) + ([tokens % length] if tokens % length else [])
    places = part.decoder.places(to_device(np.arange(tokens) % length, part.device))
    cu = CuSeqlens.of(lengths, part.device)
    layers = part.decoder.layers  # of which some may be wider than others
    layer = max(layers, key=lambda each: each.activation_bytes_per_token(part.dtype.itemsize))
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
    retention = Retention.parse(part.config.retention, part.config.budget)
    return part.footprint.rings_and_sums_bytes(retention, *part.sizes)


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
    retention = Retention.parse(part.config.retention, part.config.budget)
    return part.footprint.graph_bytes(part.config.max_num_seqs, part.max_model_len, retention)


def noted_in_steps(part: Part) -> tuple[bool, bool]:
    """Whether the engine's own retention remembers queries while decoding, and normalisers."""
    retention = Retention.parse(part.config.retention, part.config.budget)
    return most_ring_size(retention, part.max_model_len) > 0, remembers_normalisers(retention)

"""What is fixed on one rank: its part of the model, its place in the mesh, and how it computes.

Shapes: H local kv heads, m any columns.
"""

import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from saqqara.compression.retention import Retention
from saqqara.configs.step_limits import step_limits
from saqqara.configs.worker_settings import WorkerSettings

from .attention.base import AttentionBackend, get_backend
from .footprint import Footprint, stages_under
from .mesh.layout import HeadShard, MeshLayout, head_shard
from .mesh.mesh import Mesh
from .models.choice import choose_linear_backend
from .models.decoder import Decoder
from .models.rotary import length_note
from .models.spec import ModelSpec, load_spec
from .models.weights import open_weights

logger = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Choices:
    """What was chosen for a rank, and why; for the start-up log."""

    dtype_reason: str
    attention_reason: str
    linear_backend: str
    linear_reason: str


@dataclass(frozen=True)
class Part:
    """One rank's part of a replica.

    Attributes:
        config: the engine's settings.
        spec: sizes of the whole model.
        device: where this rank computes.
        dtype: of weights, keys and values.
        mesh: this rank's place among the others.
        layers: numbers of this rank's layers in the whole model.
        heads: this rank's query and kv heads.
        kv_heads_of_ranks: the kv heads of each tensor rank, in the order of the ranks.
        max_model_len: tokens of the longest sequence.
        backend: computes attention.
        decoder: the weights of this rank's layers, and of the ends of the model where it has them.
        choices: how device, dtype and backends were chosen.
    """

    config: WorkerSettings
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    mesh: Mesh
    layers: range
    heads: HeadShard
    kv_heads_of_ranks: tuple[range, ...]
    max_model_len: int
    backend: AttentionBackend
    decoder: Decoder
    choices: Choices

    @classmethod
    def make(
        cls, config: WorkerSettings, layout: MeshLayout, rank: int, store: tuple[str, int] | None
    ) -> "Part":
        """Meet the other ranks and load the weights; arguments and errors as `Worker`'s."""
        spec = load_spec(config.model)
        max_model_len = config.max_model_len or spec.max_position
        if rank == 0 and (note := length_note(spec.rope, max_model_len)) is not None:
            logger.info(note)
        device = choose_device(config, rank)
        dtype, dtype_reason = choose_dtype(config, device)
        backend, attention_reason = get_backend(
            config.attention_backend,
            device,
            dtype,
            spec.attention_softcap,
        )
        linear_backend, linear_reason = choose_linear_backend(
            config.linear_backend, device, dtype, backend.name, spec
        )
        size = layout.tensor_size
        all_heads = [
            head_shard(spec.num_query_heads, spec.num_kv_heads, size, t) for t in range(size)
        ]
        heads = all_heads[layout.tensor_rank(rank)]
        split, kept = config.layer_split, (config.retention, config.budget)
        stages = stages_under(spec, layout.pipeline_size, split, *kept)
        layers = stages[layout.pipeline_rank(rank)]
        mesh = Mesh(layout, rank, spec.num_kv_heads, device, store)
        footprint = Footprint(spec, dtype, layout, rank, layers, heads)
        config = settle(config, device, footprint, max_model_len)
        own_bytes = footprint.weight_bytes()
        with open_weights(
            config.model, spec, config.load_format, dtype, device, config.seed, own_bytes
        ) as source:
            decoder = Decoder(spec, mesh, heads, layers, source, max_model_len, linear_backend)
        return cls(
            config=config,
            spec=spec,
            device=device,
            dtype=dtype,
            mesh=mesh,
            layers=layers,
            heads=heads,
            kv_heads_of_ranks=tuple(shard.kv for shard in all_heads),
            max_model_len=max_model_len,
            backend=backend,
            decoder=decoder,
            choices=Choices(dtype_reason, attention_reason, linear_backend, linear_reason),
        )

    @cached_property
    def scale(self) -> float:
        """Factor of attention scores."""
        return self.spec.attention_scale

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """How many tokens a token sees in each of this rank's layers, itself included; 0: all."""
        return self.spec.layers.windows[self.layers.start : self.layers.stop]

    @cached_property
    def footprint(self) -> Footprint:
        """This part in numbers."""
        mesh = self.mesh
        return Footprint(self.spec, self.dtype, mesh.layout, mesh.rank, self.layers, self.heads)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Slots, tokens of the longest row, tokens of a page: what tables are as large as."""
        return self.config.max_num_seqs, self.max_model_len, self.config.page_tokens

    @property
    def samples_on_device(self) -> bool:
        """Whether tokens stay on the device, so that no step waits for the host to see them."""
        return self.choices.linear_backend == "triton"

    @property
    def num_rows(self) -> int:
        """Rows of one sequence on this rank: layers x kv heads."""
        return self.footprint.num_rows

    @property
    def replica_rows(self) -> int:
        """Rows of one sequence on all ranks of the replica; shared ones count on each."""
        return self.spec.num_layers * sum(map(len, self.kv_heads_of_ranks))

    def gather_heads(self, x: Tensor, *, are_parts: bool = False) -> Tensor:
        """Join the [H, m] of this stage's ranks to one row per kv head of the model, in order.

        `are_parts` is as for `Mesh.gather_heads`.
        """
        return self.mesh.gather_heads(x, self.kv_heads_of_ranks, are_parts=are_parts)


def choose_device(config: WorkerSettings, rank: int) -> torch.device:
    """The device of a rank: its visible GPU, or the CPU.

    Of several visible GPUs it is number `LOCAL_RANK` where that is set, else number `rank`.

    Raises:
        ValueError: a GPU is asked for and there is none, or `LOCAL_RANK` is no number.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device='cuda': no CUDA device is visible; use device='cpu' or 'auto'")
    num_gpus, local_rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    if local_rank is None:
        return torch.device("cuda", rank % num_gpus)
    if not local_rank.isdecimal() or int(local_rank) >= num_gpus:
        raise ValueError(
            f"LOCAL_RANK must be the number of one of {num_gpus} GPUs, not {local_rank!r}"
        )
    return torch.device("cuda", int(local_rank))


def settle(
    config: WorkerSettings, device: torch.device, footprint: Footprint, max_model_len: int
) -> WorkerSettings:
    """The settings with what was left open as the device has it; see `step_limits`."""
    device_bytes = 0
    if device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(device).total_memory
    retention = Retention.parse(config.retention, config.budget)
    sizes = (1, max_model_len, config.page_tokens)
    limits = step_limits(
        str(device), device_bytes, footprint.rings_and_sums_bytes(retention, *sizes)
    )
    return replace(config, **{name: getattr(limits, name) for name in config.left_open})


def choose_dtype(config: WorkerSettings, device: torch.device) -> tuple[torch.dtype, str]:
    """The model's dtype and why: bfloat16 wherever the hardware multiplies it natively."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype], "as set"
    if device.type == "cuda":
        return torch.bfloat16, "auto on a GPU"
    if cpu_has_bfloat16():
        return torch.bfloat16, "auto: this CPU multiplies bfloat16 natively"
    return torch.float32, "auto: this CPU has no bfloat16 arithmetic"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 dot products (AVX512-BF16, AMX or Arm's BF16)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = set(file.read().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})

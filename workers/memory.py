"""Where a worker computes, in which dtype, and how much memory goes where."""

import ctypes
import resource
import sys

import torch

from saqqara.configs.worker_settings import WorkerSettings

from .host_memory import available_bytes, resident_bytes, total_bytes
from .plan import WorkerMemory

GIB = 1024**3
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_CPU_SHARE = 0.3
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP_BYTES = 1 << 30
_CPU_MAX_BYTES = 4 * GIB


def choose_device(config: WorkerSettings, rank: int) -> torch.device:
    """The device of a rank: its visible GPU, or the CPU.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device='cuda': no CUDA device is visible; use device='cpu' or 'auto'")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


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


def reuse_freed_memory() -> None:
    """Let glibc keep what large temporaries free, instead of unmapping it.

    By default each activation tensor of a prefill is mapped afresh and every page of it faults in
    anew, which costs several times the arithmetic of a norm. Does nothing under another libc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def pool_pages(
    config: WorkerSettings,
    device: torch.device,
    page_bytes: int,
    local_rows: int,
    all_rows: int,
    max_row_tokens: int,
    step_bytes: int,
) -> int:
    """Pages of one worker's pool.

    Args:
        config: `kv_memory_gib` is per replica and is split over its workers by their rows; without
            it a GPU gives what `memory_utilization` leaves after weights and one step, a CPU
            min(4 GiB, 30% of what is available) per replica.
        device: where the pool lives.
        page_bytes: key and value bytes of one page.
        local_rows: layers x kv heads of this worker.
        all_rows: the same, summed over the workers of the replica.
        max_row_tokens: the longest row there can be.
        step_bytes: peak of one step's activations (GPU only).

    Raises:
        ValueError: not even one full-length sequence's rows would get a page each, or the pool is
            larger than the machine's memory.
    """
    if config.kv_memory_gib is not None:
        pool_bytes = config.kv_memory_gib * GIB * local_rows / all_rows
    elif device.type == "cuda":
        torch.cuda.empty_cache()  # what loading and the measured step left behind is free, too
        free, total = torch.cuda.mem_get_info(device)
        pool_bytes = free - (1 - config.memory_utilization) * total - step_bytes
    else:
        pool_bytes = min(_CPU_MAX_BYTES, _CPU_SHARE * available_bytes()) * local_rows / all_rows
    most = config.max_num_seqs * local_rows * -(-max_row_tokens // config.page_tokens)
    pages = min(int(pool_bytes // page_bytes), most)
    if device.type == "cpu" and pages * page_bytes > total_bytes():
        raise ValueError(
            f"kv_memory_gib={config.kv_memory_gib:g}: this worker's {pages} pages would take "
            f"{pages * page_bytes / GIB:.1f} GiB; the machine has {total_bytes() / GIB:.1f} GiB"
        )
    if pages < local_rows:
        raise ValueError(
            f"kv_memory_gib: {max(pool_bytes, 0) / GIB:.4f} GiB holds {pages} pages on this worker,"
            f" fewer than one per row ({local_rows} layers x kv heads); it needs more memory"
        )
    return pages


class MemoryMeter:
    """Keeps the peaks of what a worker holds; all in bytes."""

    def __init__(self, weight_bytes: int) -> None:
        self.weight_bytes = weight_bytes
        self.pool_bytes = 0
        self._prefill_kv_peak = 0
        self._prefill_activation_peak = 0

    def see_prefill(self, kv_bytes: int, activation_bytes: int) -> None:
        """Note what prefill holds at this moment."""
        self._prefill_kv_peak = max(self._prefill_kv_peak, kv_bytes)
        self._prefill_activation_peak = max(self._prefill_activation_peak, activation_bytes)

    def reset_peaks(self) -> None:
        """Forget the peaks of prefill (after a warm-up)."""
        self._prefill_kv_peak = 0
        self._prefill_activation_peak = 0

    def snapshot(
        self, parked_activation_bytes: int, ring_bytes: int = 0, mass_bytes: int = 0
    ) -> WorkerMemory:
        """The figures of this moment."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return WorkerMemory(
            weight_bytes=self.weight_bytes,
            pool_bytes=self.pool_bytes,
            parked_activation_bytes=parked_activation_bytes,
            ring_bytes=ring_bytes,
            mass_bytes=mass_bytes,
            prefill_kv_bytes_peak=self._prefill_kv_peak,
            prefill_activation_bytes_peak=self._prefill_activation_peak,
            resident_bytes=resident_bytes(),
            resident_bytes_peak=peak if sys.platform == "darwin" else peak * 1024,
        )

"""How much memory a worker holds, and its peaks."""

import resource
import sys
from dataclasses import replace

from saqqara.workers.host_memory import resident_bytes
from saqqara.workers.plan import WorkerMemory


class MemoryMeter:
    """Keeps the peaks of what a worker holds; all in bytes.

    Args:
        held: what does not change after start-up.
    """

    def __init__(self, held: WorkerMemory) -> None:
        self._held = held
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
        return replace(
            self._held,
            parked_activation_bytes=parked_activation_bytes,
            ring_bytes=ring_bytes,
            mass_bytes=mass_bytes,
            prefill_kv_bytes_peak=self._prefill_kv_peak,
            prefill_activation_bytes_peak=self._prefill_activation_peak,
            resident_bytes=resident_bytes(),
            resident_bytes_peak=peak if sys.platform == "darwin" else peak * 1024,
        )

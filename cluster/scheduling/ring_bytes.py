"""Bytes of the queries that a sequence remembers on each worker, counted without asking.

Shapes: W workers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saqqara.compression.growth import remembers_normalisers, ring_size
from saqqara.compression.retention import Retention
from saqqara.workers.plan import WorkerInfo


def ring_bytes(
    retention: Retention, prompt_tokens: int, workers: Sequence[WorkerInfo]
) -> NDArray[np.int64]:
    """Bytes of the ring of a sequence with such a prompt, int64 [W]; normalisers included."""
    normalised = remembers_normalisers(retention)
    sizes = [
        ring_size(retention, prompt_tokens, worker.max_model_len)
        * (worker.ring_query_bytes + normalised * worker.ring_normaliser_bytes)
        for worker in workers
    ]
    return np.array(sizes, dtype=np.int64)

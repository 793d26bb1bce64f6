"""Which replica a request goes to: the one with the least work left, by the cost model's estimate.

What is left follows from what was sent there and when, so it is known before any replica has run,
and replicas can be simulated one after the other, or side by side. One that is down is busy until
it is back.

Shapes: N requests, R replicas.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .arrivals import Floats, Ints
from .faults import Outage


def route(
    seconds: Floats, work_seconds: Floats, outages: Sequence[Sequence[Outage]]
) -> NDArray[np.int64]:
    """The replica of each request, int64 [N].

    Args:
        seconds: when each arrives, in order, [N].
        work_seconds: for how long each keeps a replica busy that works on many at once, [N].
        outages: of each replica, in order; its length is R.
    """
    done_heap = [(0.0, replica) for replica in range(len(outages))]
    routed: Ints = np.empty(len(seconds), dtype=np.int64)
    next_R = [0] * len(outages)
    for number, (now, work) in enumerate(zip(seconds.tolist(), work_seconds.tolist(), strict=True)):
        while True:
            done, replica = done_heap[0]
            back = _back(outages[replica], next_R, replica, now)
            if back <= done:
                break
            heapq.heapreplace(done_heap, (back, replica))  # it does nothing before that
        heapq.heapreplace(done_heap, (max(done, now) + work, replica))
        routed[number] = replica
    return routed


def _back(known: Sequence[Outage], next_R: list[int], replica: int, now: float) -> float:
    """When the outage ends in which a replica is; 0 where it is in none."""
    while next_R[replica] < len(known) and known[next_R[replica]].back <= now:
        next_R[replica] += 1
    if next_R[replica] == len(known) or known[next_R[replica]].start > now:
        return 0.0
    return known[next_R[replica]].back

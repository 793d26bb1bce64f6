"""Whether a preempted sequence is copied or computed again goes by what both have cost."""

import numpy as np

from saqqara.cluster.reuse.parked import Counts, HostMemory, Prices


def test_the_cheaper_way_is_taken_and_the_other_tried_again() -> None:
    prices = Prices()
    assert prices.copy_pays(10**9, 1)  # nothing is known yet
    prices.note(1000, 0.5, 0, 9.0)  # of seconds without a prefill nothing follows
    assert prices.copy_pays(10**9, 1)
    prices.note(0, 0.0, 100, 1.0)
    # A byte there and back takes 1 ms, a token of a layer 10 ms.
    assert prices.copy_pays(999, 100)
    assert not prices.copy_pays(1001, 100)
    assert prices.copy_pays(1001, 100)  # the last copy may have been slow by chance


def test_memory_that_a_plan_gives_up_is_free_for_the_next() -> None:
    host = HostMemory(np.array([10, 20]), Counts())
    first = host.put(np.array([6, 6]), 1)
    assert first is not None
    assert host.put(np.array([5, 1]), 1) is None
    host.begin(first)
    assert (host.num_parked, host.used_bytes, host.take_copied()) == (1, 12, 12)
    host.drop(first)
    assert host.put(np.array([5, 1]), 1) is None  # the plan in the making parks before it drops
    host.settle()
    assert host.take_dropped() == [first]
    second = host.put(np.array([10, 20]), 1)
    assert second is not None
    host.cancel(second)
    assert host.put(np.array([10, 20]), 1) is not None

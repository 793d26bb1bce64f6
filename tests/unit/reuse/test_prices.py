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


def test_memory_that_a_plan_drops_is_free_at_once_and_what_resumes_for_the_next() -> None:
    host = HostMemory(np.array([10, 20]), Counts())
    assert not host.is_worth(np.array([10, 21]), 10**9)
    first = host.put(np.array([6, 6]))
    assert first is not None
    assert host.put(np.array([5, 1])) is None
    host.begin(first)
    assert (host.num_parked, host.used_bytes, host.take_copied()) == (1, 12, 12)
    host.settle()
    host.drop(first)
    assert host.take_dropped() == [first]
    second = host.put(np.array([10, 20]))
    assert second is not None
    host.begin(second)
    host.resume(second)
    assert host.put(np.array([1, 0])) is None  # it leaves after others have come
    host.settle()
    third = host.put(np.array([10, 20]))
    assert third is not None
    host.cancel(third)
    assert host.put(np.array([10, 20])) is not None


def test_conversations_count_beside_sequences() -> None:
    host = HostMemory(np.array([10, 20]), Counts())
    host.offload(-1, np.array([4, 4]))
    host.offload(-2, np.array([4, 4]))
    assert host.put(np.array([3, 1])) is None
    assert (host.num_parked, host.num_quiet, host.quiet_bytes) == (0, 2, 16)
    assert host.take_copied() == 16
    host.settle()
    host.offload(-3, np.array([1, 1]))
    host.drop_quiet(-3)  # by the plan that would have moved it: nothing is copied
    host.bring_back(-2)
    assert host.take_copied() == 8
    host.settle()
    host.drop_quiet(-1)
    assert (-1 in host, host.free_bytes.tolist()) == (False, [10, 20])

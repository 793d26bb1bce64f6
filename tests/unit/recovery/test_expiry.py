"""Deadlines are kept in order, each is told once, and what has ended leaves nothing behind."""

from saqqara.cluster.recovery.expiry import Expiry


def test_requests_expire_in_order_and_once() -> None:
    expiry = Expiry()
    for name, due in (("late", 30.0), ("soon", 10.0), ("ended", 5.0), ("next", 20.0)):
        expiry.add(name, due)
    expiry.forget("ended")
    assert expiry.pop_expired(9.9) == []
    assert expiry.pop_expired(20.0) == ["soon", "next"]
    assert expiry.pop_expired(20.0) == []
    assert len(expiry) == 1


def test_an_id_that_is_used_again_has_its_own_deadline() -> None:
    expiry = Expiry()
    expiry.add("r", 10.0)
    expiry.forget("r")
    expiry.add("r", 50.0)
    assert expiry.pop_expired(40.0) == []
    assert expiry.pop_expired(50.0) == ["r"]


def test_requests_that_end_early_take_no_memory() -> None:
    expiry = Expiry()
    expiry.add("stays", 1e9)
    for number in range(5000):
        expiry.add(str(number), 1e6)
        expiry.forget(str(number))
    assert len(expiry) == 1
    assert len(vars(expiry)["_heap"]) < 200

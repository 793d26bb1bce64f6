"""An engine that several parts use at once, and the report of several engines."""

import pytest
from support.fake_client import FakeClient

from saqqara.cluster.batch.parts.shared_engine import EngineShare, SharedEngine
from saqqara.cluster.batch.parts.totals import combined
from saqqara.cluster.engine.report import Latency
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.request import Request


def ask(*names: str) -> list[Request]:
    return [Request(request_id=name, prompt=name) for name in names]


def take(share: EngineShare, count: int) -> list[str]:
    """The ids of the next outputs."""
    ids: list[str] = []
    while len(ids) < count:
        ids += [output.request_id for output in share.poll(5.0)]
    return sorted(ids)


def test_each_user_gets_its_own_outputs() -> None:
    engine = SharedEngine(FakeClient(max_prompt_tokens=5), max_in_flight=4)
    first, second = engine.share(), engine.share()
    assert [r.request_id for r in first.submit(ask("a", "too long", "b"))] == ["too long"]
    second.submit(ask("c"))
    assert take(second, 1) == ["c"]
    assert take(first, 2) == ["a", "b"]
    assert engine.room() == 4
    assert second.poll() == []
    engine.close()


def test_room_is_what_all_users_leave() -> None:
    client = FakeClient(per_poll=0)
    engine = SharedEngine(client, max_in_flight=4)
    first, second = engine.share(), engine.share()
    first.submit(ask("a", "b", "c"))
    assert engine.room() == 1
    second.submit(ask("d", "e"))
    assert engine.room() == 0
    first.shutdown()
    assert client.aborted == ["a", "b", "c"]
    engine.close()


def test_an_id_that_the_engine_has_is_refused_and_stays_its_owners() -> None:
    client = FakeClient(per_poll=0)
    engine = SharedEngine(client, max_in_flight=9)
    first, second = engine.share(), engine.share()
    assert first.submit(ask("a")) == []
    rejections = second.submit(ask("a", "b", "b"))
    assert [r.request_id for r in rejections] == ["a", "b"]
    assert "already" in rejections[0].error
    assert [request.request_id for request in client.submitted] == ["a", "b"]
    second.abort(["a"])
    assert client.aborted == []
    client.per_poll = 1
    assert take(first, 1) == ["a"]
    assert take(second, 1) == ["b"]
    engine.close()


def test_every_user_is_told_that_the_engine_has_died() -> None:
    engine = SharedEngine(FakeClient(die_after=0), max_in_flight=4)
    shares = [engine.share(), engine.share()]
    for share in shares:
        with pytest.raises(EngineDeadError, match="rank 1 died"):
            share.poll(5.0)
    with pytest.raises(EngineDeadError, match="rank 1 died"):
        engine.share().poll(5.0)  # whoever comes later, too
    engine.close()


def test_the_report_of_several_engines() -> None:
    report = FakeClient().report()
    slow = report.model_copy(
        update={
            "wall_seconds": 4.0,
            "e2e_latency": Latency(count=3, mean=1.5, p50=2.0, p99=3.0),
            "requests": {"length": 2, "error": 1},
            "recoveries": {"kill": 1},
            "down_seconds": 1.5,
        }
    )
    both = combined([report, slow])
    assert both is not None
    assert (both.prompt_tokens, both.generation_tokens, both.num_steps) == (200, 20, 14)
    assert (both.wall_seconds, both.prompt_tokens_per_second) == (4.0, 50.0)
    assert both.e2e_latency == Latency(count=4, mean=1.25, p50=2.0, p99=3.0)
    assert both.requests == {"length": 2, "error": 1}
    assert (both.recoveries, both.down_seconds) == ({"kill": 1}, 1.5)
    assert both.kept_tokens_by_layer == (20, 10)
    assert both.pages_leaked == 0
    assert combined([report, report.model_copy(update={"pages_leaked": None})]).pages_leaked is None  # type: ignore[union-attr]
    assert combined([report]) is report
    assert combined([]) is None

"""What the router builds on is private to Serve: a new Ray must still have it, in this form."""

import asyncio
import inspect
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

ROOT = Path(__file__).resolve().parents[2]
READ_ANEW = f"Ray {ray.__version__} has changed what on_ray/router.py builds on; read both anew"


def test_the_method_that_is_overridden_has_its_signature() -> None:
    from saqqara.cluster.on_ray.router import LeastLoadedRouter

    name = "_choose_replica_for_request"
    theirs = getattr(LeastLoadedRouter.__base__, name, None)
    assert inspect.iscoroutinefunction(theirs), READ_ANEW
    parameters = inspect.signature(theirs).parameters
    assert list(parameters) == ["self", "pending_request", "is_retry"], READ_ANEW
    assert parameters["is_retry"].kind is inspect.Parameter.KEYWORD_ONLY, READ_ANEW
    assert parameters["is_retry"].default is False, READ_ANEW
    ours = inspect.signature(getattr(LeastLoadedRouter, name)).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in parameters.values()
    ]


def test_it_can_see_whether_there_are_replicas() -> None:
    from saqqara.cluster.on_ray.router import LeastLoadedRouter

    seen = inspect.getattr_static(LeastLoadedRouter.__base__, "curr_replicas", None)
    assert isinstance(seen, property), READ_ANEW


def test_its_error_is_one_that_serve_answers_with_503() -> None:
    from saqqara.cluster.on_ray.router import NoReplicaError

    parameters = list(inspect.signature(NoReplicaError.__base__.__init__).parameters)
    assert parameters[1:] == [
        "num_queued_requests",
        "max_queued_requests",
        "status_code",
        "retry_after_s",
    ], READ_ANEW
    error = NoReplicaError(0, 0, 503, 5)
    assert (error.status_code, error.retry_after_s) == (503, 5), READ_ANEW
    assert error.message["error"]["code"] == "no_engine"


@pytest.mark.parametrize("extra", [None, "serve"])
def test_ray_is_bounded_to_the_minor_version_that_was_read(extra: str | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    [line] = [line for line in lines if line.startswith("ray[")]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    [exact] = re.findall(r"^ray==(\d+)\.(\d+)\.", constraints, re.MULTILINE)
    major, minor = map(int, exact)
    assert line.endswith(f">={major}.{minor},<{major}.{minor + 1}")


def test_replicas_with_room_are_asked_first_and_all_of_them() -> None:
    from saqqara.cluster.on_ray.router import LOAD, LeastLoadedRouter

    parameters = inspect.signature(LeastLoadedRouter.__base__.choose_replicas).parameters
    assert list(parameters) == ["self", "candidate_replicas", "pending_request"], READ_ANEW
    assert hasattr(LeastLoadedRouter.__base__, "initialize_state"), READ_ANEW
    replicas = [
        SimpleNamespace(name=name, routing_stats=stats)
        for name, stats in (("idle", {LOAD: 0.1}), ("full", {LOAD: 1.0}), ("new", {}))
    ]
    router = object.__new__(LeastLoadedRouter)
    first, second = asyncio.run(router.choose_replicas(replicas))
    assert {replica.name for replica in first} == {"idle", "new"}
    assert [replica.name for replica in second] == ["full"]
    full = [SimpleNamespace(routing_stats={LOAD: 3.0})] * 20
    [some] = asyncio.run(router.choose_replicas(full))
    assert len(some) == 8


def test_a_session_stays_with_its_replica_while_that_costs_no_balance() -> None:
    from ray.serve._private.common import RequestMetadata

    from saqqara.cluster.on_ray.router import LOAD, LeastLoadedRouter

    assert "session_id" in inspect.signature(RequestMetadata).parameters, READ_ANEW
    router = object.__new__(LeastLoadedRouter)

    def replicas(**loads: float) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats={LOAD: load})
            for name, load in loads.items()
        ]

    def first(session_id: str, among: list[SimpleNamespace]) -> list[str]:
        request = SimpleNamespace(metadata=SimpleNamespace(session_id=session_id))
        chosen = asyncio.run(router.choose_replicas(among, request))
        return [replica.replica_id.unique_id for replica in chosen[0]]

    idle = replicas(a=0.0, b=0.1, c=0.2)
    homes = {f"talk {i}": first(f"talk {i}", idle) for i in range(30)}
    assert all(len(home) == 1 for home in homes.values())
    assert {name for [name] in homes.values()} == {"a", "b", "c"}
    assert all(first(talk, idle[::-1]) == home for talk, home in homes.items())  # as any proxy
    without_c = {talk: first(talk, idle[:2]) for talk in homes}
    assert all(without_c[talk] == home for talk, home in homes.items() if home != ["c"])
    [talk] = [talk for talk, home in homes.items() if home == ["c"]][:1]
    assert sorted(first(talk, replicas(a=0.0, b=0.1, c=0.3))) == ["a", "b", "c"]  # much more to do
    assert sorted(first(talk, replicas(a=1.0, b=0.9, c=0.95))) == ["b"]  # no room
    assert sorted(first("", idle)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("loads", "target", "wanted"),
    [
        ({"a": 0.2}, 0.8, 0.25),  # Serve rounds up, to one
        ({"a": 0.8, "b": 0.8}, 0.8, 2.0),
        ({"a": 3.0, "b": 0.2}, 0.8, 4.0),  # a long queue, wherever it is
        ({"a": 1.0, "b": 1.0}, 0.5, 4.0),
    ],
)
def test_the_load_says_how_many_replicas_there_should_be(
    loads: dict[str, float], target: float, wanted: float
) -> None:
    from saqqara.cluster.on_ray.router import LOAD, LoadPolicy

    context = SimpleNamespace(aggregated_metrics={LOAD: loads}, target_num_replicas=7)
    got, state = LoadPolicy(target)(context)
    assert got == pytest.approx(wanted)
    assert state == {}
    silent = SimpleNamespace(aggregated_metrics={}, target_num_replicas=7)
    assert LoadPolicy(target)(silent) == (7, {})

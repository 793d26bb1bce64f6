"""The parts of the server that need no server: keys, admission, settings."""

import asyncio
import hashlib
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from saqqara.cluster.cli.serve import ServerFlags, merged_config
from saqqara.cluster.errors import EngineDeadError, WorkerDiedError
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.events import dead_engine
from saqqara.cluster.server.admission import Admission, DrainingError, OverloadedError
from saqqara.cluster.server.api_keys import KEYS_VARIABLE, ApiKeys
from saqqara.cluster.server.io import race, read_body
from saqqara.cluster.settings import serve_config, served_engine

MODEL = {"model_id": "tiny", "model_source": "/models/tiny"}


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\n  from-file \n\n")
    keys = ApiKeys.load(str(file), {KEYS_VARIABLE: "one, two"})
    for key in ("one", "two", "from-file"):
        assert keys.accepts(f"Bearer {key}")
        assert keys.accepts(f"bearer  {key} ")
    for wrong in (None, "", "one", "Bearer", "Bearer ", "Basic one", "Bearer on", "Bearer One"):
        assert not keys.accepts(wrong)


def test_without_keys_everybody_is_let_in() -> None:
    keys = ApiKeys.load(None, {})
    assert len(keys) == 0
    assert keys.accepts(None)


def test_a_key_cannot_be_read_back() -> None:
    keys = ApiKeys.load(None, {KEYS_VARIABLE: "sk-secret"})
    assert "sk-secret" not in repr(keys) + repr(vars(keys))
    assert hashlib.sha256(b"sk-secret").digest() in vars(keys)["_hashes"]


@pytest.mark.parametrize("content", [None, "", "# nothing\n"])
def test_a_file_without_keys_is_an_error(tmp_path: Path, content: str | None) -> None:
    """Else a mistyped path would open the server to everybody."""
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(ValueError, match=r"api_key_file: .*keys"):
        ApiKeys.load(str(tmp_path / "keys"), {})
    with pytest.raises(ValueError, match=KEYS_VARIABLE):
        ApiKeys.load(None, {KEYS_VARIABLE: " , "})


def test_admission_counts_sequences_and_says_when_to_come_again() -> None:
    admission = Admission(max_running=2, max_waiting=3)
    with admission.enter(3), admission.enter(2):
        assert admission.num_requests == 2
        with pytest.raises(OverloadedError) as caught, admission.enter(1):
            pass
        assert 1 <= caught.value.retry_seconds <= 60
    assert admission.num_requests == 0
    with admission.enter(5):
        pass


class Clock:
    """Time that only goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refused_for(admission: Admission) -> int:
    """What a client is told that finds the queue full."""
    with pytest.raises(OverloadedError) as caught, admission.enter(1):
        pass
    return caught.value.retry_seconds


@pytest.mark.parametrize(
    ("seconds", "num_at_once", "told"), [(2.0, 1, 20), (0.5, 1, 5), (4.0, 4, 10), (0.01, 1, 1)]
)
def test_the_wait_is_the_queue_by_the_rate_at_which_requests_finish(
    seconds: float, num_at_once: int, told: int
) -> None:
    clock = Clock()
    admission = Admission(max_running=2, max_waiting=10, clock=clock)
    with admission.enter(1):
        clock.now += 3600  # with a free slot, which says nothing of what can be done
    with admission.enter(12 - num_at_once):
        for _ in range(40):
            with admission.enter(num_at_once):
                clock.now += seconds
        with admission.enter(num_at_once):
            assert refused_for(admission) == told


def test_the_wait_grows_while_nothing_finishes_and_has_a_bound() -> None:
    clock = Clock()
    admission = Admission(max_running=2, max_waiting=10, clock=clock)
    with admission.enter(10):
        with admission.enter(2):
            clock.now += 1
        with admission.enter(2):
            assert refused_for(admission) == 5
            clock.now += 3
            assert refused_for(admission) == 20
            clock.now += 1000
            assert refused_for(admission) == 60


def half_a_body(*chunks: bytes) -> Request:
    """A request whose body goes on for ever after these chunks."""
    messages = iter(chunks)

    async def receive() -> Message:
        for chunk in messages:
            return {"type": "http.request", "body": chunk, "more_body": True}
        await asyncio.Event().wait()
        raise AssertionError

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


async def test_a_body_that_does_not_come_in_time_is_given_up() -> None:
    with pytest.raises(ApiError, match=r"has not come within 0\.01 s") as caught:
        await read_body(half_a_body(b"{"), max_bytes=100, timeout_seconds=0.01)
    assert (caught.value.status, caught.value.code) == (408, "request_timeout")
    assert caught.value.headers["Connection"] == "close"


async def test_a_body_without_a_length_is_cut_where_it_is_too_large() -> None:
    with pytest.raises(ApiError) as caught:
        await read_body(half_a_body(b"x" * 60, b"x" * 60), max_bytes=100, timeout_seconds=60)
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


async def test_a_body_on_its_way_does_not_hold_up_the_end() -> None:
    admission = Admission(max_running=1, max_waiting=0)
    reading = read_body(half_a_body(b"{"), max_bytes=100, timeout_seconds=60)
    waits = asyncio.create_task(race(reading, admission.wait_closed(), DrainingError()))
    await asyncio.sleep(0)
    admission.close()
    with pytest.raises(DrainingError):
        await waits


async def test_a_closed_admission_lets_what_is_in_finish() -> None:
    admission = Admission(max_running=2, max_waiting=0)
    assert await admission.wait_idle(0)
    with admission.enter(1):
        admission.close()
        with pytest.raises(DrainingError), admission.enter(1):
            pass
        assert not await admission.wait_idle(0.01)
        idle = asyncio.create_task(admission.wait_idle(10))
        await asyncio.sleep(0)
    assert await idle


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            WorkerDiedError("rank 1 died; /logs/rank-1.log", 1),
            "has lost rank 1 and is being replaced",
        ),
        (KeyError("/secret"), "has failed (KeyError) and is being replaced"),
        (None, "was shut down"),
    ],
)
def test_clients_hear_what_the_engine_has_lost_but_no_path(
    cause: Exception | None, message: str
) -> None:
    death = EngineDeadError("the engine was shut down")
    death.__cause__ = cause
    error = dead_engine(death)
    assert error.body["error"]["message"] == f"the engine {message}"
    assert (error.status, error.body["error"]["code"]) == (503, "engine_dead")
    assert int(error.headers["Retry-After"]) >= 1


def test_several_ranks_run_on_ray_and_one_in_its_replica() -> None:
    def executor(**engine: Any) -> str:
        settings = {"model_loading_config": MODEL, "engine_kwargs": engine}
        return served_engine(serve_config(settings)).executor

    assert executor() == "local"
    assert executor(tensor_parallel_size=2) == "ray"
    assert executor(executor="ray") == "ray"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model_loading_config: field required"),
        ({"model_loading_config": {}}, "model_loading_config.model_id: field required"),
        ({"engine_kwarg": {}}, "unknown key 'engine_kwarg'; did you mean 'engine_kwargs'"),
        ({"engine_kwargs": {"max_seqs": 1}}, "engine_kwargs: unknown key 'max_seqs'"),
        ({"engine_kwargs": {"model": "x"}}, "engine_kwargs: model is set by"),
        ({"engine_kwargs": {"metrics_port": 0}}, "engine_kwargs: metrics_port has no use"),
        ({"engine_kwargs": {"max_num_seqs": 0}}, "max_num_seqs"),
        ({"deployment_config": {"num_replicas": 0}}, "deployment_config.num_replicas"),
        ({"placement_group_config": {"bundles": []}}, "placement_group_config.bundles"),
        ({"limits": {"max_body": 1}}, "limits.max_body"),
    ],
)
def test_a_wrong_setting_of_a_server_is_named(settings: dict[str, Any], message: str) -> None:
    if "model_loading_config" not in settings and settings:
        settings = {"model_loading_config": MODEL, **settings}
    with pytest.raises(ValueError, match=message):
        serve_config(settings)


def test_flags_override_the_file() -> None:
    args = {
        "model_loading_config": MODEL,
        "engine_kwargs": {"max_num_seqs": 4, "retention": "full"},
        "limits": {"max_n": 2, "max_queue": 9},
    }
    flags = ServerFlags(
        max_queue=0,
        num_replicas=3,
        served_model_names=("mine", "yours"),
        body_timeout_seconds=2.5,
        allowed_origins=("https://example.com",),
        ui=False,
    )
    config = merged_config(args, flags, {"retention": "pyramidkv", "budget": "25%"})
    assert config.model_loading_config.model_dump() == {**MODEL, "model_id": "mine"}
    assert config.model_aliases == ("yours",)
    assert not config.trust_request_chat_template
    assert config.engine_kwargs == {"max_num_seqs": 4, "retention": "pyramidkv", "budget": "25%"}
    assert (config.limits.max_n, config.limits.max_queue) == (2, 0)
    assert config.limits.body_timeout_seconds == 2.5
    assert config.allowed_origins == ("https://example.com",)
    assert not config.ui
    assert config.deployment_config.num_replicas == 3
    named = merged_config({}, ServerFlags(), {"model": "/models/SmolLM2"})
    assert named.model_loading_config.model_id == "SmolLM2"
    assert named.ui
    with pytest.raises(ValueError, match="model is required"):
        merged_config({}, ServerFlags(), {})


def test_each_key_has_an_owner_that_is_the_same_everywhere_and_tells_nothing() -> None:
    one = ApiKeys.load(None, {KEYS_VARIABLE: "one,two"})
    other = ApiKeys.load(None, {KEYS_VARIABLE: "three, one"})
    assert one.owner("Bearer one") == other.owner("bearer one ")
    owners = {one.owner("Bearer one"), one.owner("Bearer two"), other.owner("Bearer three")}
    assert len(owners) == 3
    for owner in owners:
        assert re.fullmatch("[0-9a-f]{32}", owner)
    assert hashlib.sha256(b"one").hexdigest()[:32] != one.owner("Bearer one")
    with pytest.raises(AssertionError):
        one.owner("Bearer three")


def test_without_keys_all_are_one_owner() -> None:
    assert {ApiKeys().owner(header) for header in (None, "Bearer one", "")} == {"anonymous"}


def fill(admission: Admission, stack: ExitStack, owner: str, most: int = 10**6) -> int:
    """How many sequences of an owner are taken, one by one, until one is refused."""
    for count in range(most):
        try:
            stack.enter_context(admission.enter(1, owner))
        except OverloadedError as error:
            return count if error.is_share and 1 <= error.retry_seconds <= 60 else -1
    return most


def test_no_owner_fills_the_queue_and_a_newcomer_finds_room() -> None:
    admission = Admission(max_running=16, max_waiting=256, max_share=0.75)
    with ExitStack() as stack:
        assert fill(admission, stack, "a") == 16 + 192 == admission.capacity_of("a")
        taken = [fill(admission, stack, owner) for owner in "bc"]
        assert all(count > 0 for count in taken)
        assert taken == sorted(taken, reverse=True)
    with ExitStack() as stack:
        assert fill(admission, stack, "a") == 208  # all was let go


def test_owners_that_come_at_once_share_alike_and_leave_room() -> None:
    admission = Admission(max_running=16, max_waiting=256, max_share=0.75)
    with ExitStack() as stack:
        counts = Counter("")
        for _ in range(300):
            for owner in "abc":
                counts[owner] += fill(admission, stack, owner, most=1)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert 16 + 256 - counts.total() > 20


def test_a_slot_that_is_free_is_anybodys() -> None:
    admission = Admission(max_running=4, max_waiting=0, max_share=0.25)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(admission.enter(1, "a"))
        with pytest.raises(OverloadedError) as caught:
            stack.enter_context(admission.enter(1, "b"))
        assert not caught.value.is_share


def test_without_owners_the_whole_queue_is_everybodys() -> None:
    admission = Admission(max_running=2, max_waiting=3, max_share=0.1)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(admission.enter(1))
        assert admission.capacity == 5

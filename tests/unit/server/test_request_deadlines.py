"""`timeout_seconds` counts from a request's arrival: 408 before the first event, then the last."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from support.asgi_client import AsgiAnswer, call
from support.fake_clock import FakeClock
from support.fake_model import SPEC, Ascii
from support.fake_replica import make_workers
from support.fragile_replica import FragileReplica

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.recovery.attempts import RecoveryLimits
from saqqara.cluster.server.api_keys import ApiKeys
from saqqara.cluster.server.app import make_app
from saqqara.cluster.server.generation import Generation
from saqqara.cluster.settings import serve_config
from saqqara.configs.schema import EngineConfig

SHORT = 0.05  # of a request that would wait for ever
LONG = 3600.0


class Server:
    """The application over an engine whose clock is the test's; its workers, lost, stay lost."""

    def __init__(self, **limits: Any) -> None:
        self.clock = FakeClock()
        self.replica = FragileReplica(make_workers(1000), failing_starts=10**9)
        self.clock.on_wait = self.replica.tick
        config = EngineConfig(model="fake", executor="ray", max_num_seqs=4)
        tokenizer = Tokenizer(Ascii())
        endless = RecoveryLimits(max_attempts=10**9)
        engine = Engine(config, self.replica, tokenizer, SPEC, limits=endless, clock=self.clock)
        loading = {"model_id": "m", "model_source": "fake"}
        serve = serve_config({"model_loading_config": loading, "limits": limits})
        self.generation = Generation(serve, config, engine, tokenizer)
        self.app = make_app(self.generation, ApiKeys())

    async def complete(self, **fields: Any) -> AsgiAnswer:
        body = {"model": "m", "prompt": "a", "max_tokens": 150, "ignore_eos": True, **fields}
        return await call(self.app, "POST", "/v1/completions", body)

    async def idle(self) -> None:
        """Wait until the engine has let go of everything."""
        while (await self.generation.engine.report()).pages_leaked or not self.is_empty:
            await asyncio.sleep(0)

    @property
    def is_empty(self) -> bool:
        return self.generation.admission.num_requests == 0


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(default_timeout_seconds=SHORT, max_timeout_seconds=LONG)
    yield server
    server.generation.engine.shutdown()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seconds", [SHORT, None])
async def test_an_answer_that_does_not_come_in_time_is_a_408(
    server: Server, stream: bool, seconds: float | None
) -> None:
    server.replica.lose("died")
    answer = await server.complete(stream=stream, timeout_seconds=seconds, n=2)
    assert answer.status == 408
    assert answer.error["code"] == "deadline_exceeded"
    assert answer.error["param"] == "timeout_seconds"
    assert answer.headers["x-should-retry"] == "false"
    await server.idle()


async def test_a_stream_that_has_begun_ends_with_the_error(server: Server) -> None:
    seen = threading.Event()

    def let_time_pass(answer: AsgiAnswer) -> None:
        server.clock.time += LONG
        seen.set()

    def step_once_it_was_seen() -> None:
        server.replica.tick()
        if server.replica.num_steps > 3:
            seen.wait(60)

    server.clock.on_wait = step_once_it_was_seen
    body = {"model": "m", "prompt": "a", "max_tokens": 150, "ignore_eos": True}
    body |= {"stream": True, "timeout_seconds": LONG}
    answer = await call(server.app, "POST", "/v1/completions", body, on_piece=let_time_pass)
    assert answer.status == 200
    assert "choices" in answer.events[0]
    assert answer.events[-1]["error"]["code"] == "deadline_exceeded"
    assert len(answer.events) < 150
    await server.idle()


async def test_the_time_counts_from_the_arrival(server: Server) -> None:
    """A body that took longer than the time that it asks for is too late."""

    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"model": "m", "prompt": "a", "timeout_seconds": 0.05, '
        await asyncio.sleep(SHORT)
        yield b'"max_tokens": 2}'

    answer = await call(server.app, "POST", "/v1/completions", chunks=slowly())
    assert (answer.status, answer.error["code"]) == (408, "deadline_exceeded")


async def test_an_answer_in_time_is_whole(server: Server) -> None:
    answer = await server.complete(timeout_seconds=LONG)
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] == 150


@pytest.mark.parametrize(
    ("seconds", "code"),
    [*((wrong, "invalid_value") for wrong in (0, -1, "1", True)), (LONG + 1, "limit_exceeded")],
)
async def test_a_wrong_time_is_refused(server: Server, seconds: Any, code: str) -> None:
    answer = await server.complete(timeout_seconds=seconds)
    assert answer.status == 400
    assert (answer.error["param"], answer.error["code"]) == ("timeout_seconds", code)

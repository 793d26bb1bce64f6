"""Keys share a server: none fills its queue, and none waits for all that another one asks."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.asgi_client import AsgiAnswer, call
from support.fake_clock import FakeClock
from support.fake_model import SPEC, Ascii
from support.fake_replica import make_workers
from support.fragile_replica import FragileReplica

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.server.api_keys import KEYS_VARIABLE, ApiKeys
from saqqara.cluster.server.app import make_app
from saqqara.cluster.server.generation import Generation
from saqqara.cluster.settings import serve_config
from saqqara.configs.schema import EngineConfig


class Server:
    """One slot and a queue of 40, for the keys `a` and `b`; it computes when it is let."""

    def __init__(self, keys: str = "a,b") -> None:
        self.may_run = threading.Event()
        clock = FakeClock()
        replica = FragileReplica(make_workers(1000))

        def tick() -> None:
            self.may_run.wait(60)
            replica.tick()

        clock.on_wait = tick
        config = EngineConfig(model="fake", executor="ray", max_num_seqs=1)
        tokenizer = Tokenizer(Ascii())
        engine = Engine(config, replica, tokenizer, SPEC, clock=clock)
        loading = {"model_id": "m", "model_source": "fake"}
        serve = serve_config({"model_loading_config": loading, "limits": {"max_queue": 40}})
        self.generation = Generation(serve, config, engine, tokenizer)
        self.app = make_app(self.generation, ApiKeys.load(None, {KEYS_VARIABLE: keys}))
        self.ended: list[str] = []

    async def ask(self, key: str, **fields: Any) -> AsgiAnswer:
        body = {"model": "m", "prompt": "a", "max_tokens": 20, "ignore_eos": True, **fields}
        headers = {"Authorization": f"Bearer {key}"}
        answer = await call(self.app, "POST", "/v1/completions", body, headers)
        if answer.status == 200:
            self.ended.append(key)
        return answer


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.may_run.set()
    server.generation.engine.shutdown()


async def test_a_key_that_floods_the_server_gets_429_and_others_are_served_in_turn(
    server: Server,
) -> None:
    server.may_run.set()
    await server.ask("a")
    server.may_run.clear()
    flood = [asyncio.create_task(server.ask("a")) for _ in range(100)]
    while sum(task.done() for task in flood) < 100 - 31:
        await asyncio.sleep(0)
    refused = [task.result() for task in flood if task.done()]
    assert len(refused) == 69  # one slot, and three quarters of the queue of 40
    for answer in refused:
        assert (answer.status, answer.error["code"]) == (429, "queue_share_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    other = asyncio.create_task(server.ask("b"))
    while server.generation.admission.num_requests < 32:
        await asyncio.sleep(0)
    server.may_run.set()
    assert (await other).status == 200
    answers = await asyncio.gather(*flood)
    assert sum(answer.status == 200 for answer in answers) == 31
    assert server.ended.index("b") <= 4


async def test_a_request_with_more_choices_than_a_key_may_have_is_refused_at_once(
    server: Server,
) -> None:
    answer = await server.ask("a", n=16, prompt=["a", "b"])
    assert answer.status == 400
    assert "31 that the server takes at once" in answer.error["message"]


async def test_one_key_alone_has_the_whole_queue() -> None:
    server = Server(keys="a")
    tasks = [asyncio.create_task(server.ask("a")) for _ in range(41)]
    while server.generation.admission.num_requests < 41:
        await asyncio.sleep(0)
    answer = await server.ask("a")
    assert (answer.status, answer.error["code"]) == (429, "queue_full")
    server.may_run.set()
    assert {answer.status for answer in await asyncio.gather(*tasks)} == {200}
    server.generation.engine.shutdown()

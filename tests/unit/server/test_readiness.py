"""Readiness and liveness while the engine starts lost workers again."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
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

ENDLESS = RecoveryLimits(max_attempts=10**9)


class Server:
    """The application over an engine whose workers do not come back."""

    def __init__(self) -> None:
        clock = FakeClock()
        self.replica = FragileReplica(make_workers(1000), failing_starts=10**9)
        clock.on_wait = self.replica.tick
        config = EngineConfig(model="fake", executor="ray", max_num_seqs=4)
        tokenizer = Tokenizer(Ascii())
        engine = Engine(config, self.replica, tokenizer, SPEC, limits=ENDLESS, clock=clock)
        serve = serve_config({"model_loading_config": {"model_id": "m", "model_source": "fake"}})
        self.generation = Generation(serve, config, engine, tokenizer)
        self.app = make_app(self.generation, ApiKeys())

    async def get(self, path: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of the answer."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        head = next(m for m in sent if m["type"] == "http.response.start")
        headers = {name.decode().lower(): value.decode() for name, value in head["headers"]}
        body = b"".join(m.get("body", b"") for m in sent)
        return head["status"], headers, json.loads(body)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.generation.engine.shutdown()


async def test_an_engine_with_workers_is_ready(server: Server) -> None:
    assert (await server.get("/health"))[0] == 200
    assert (await server.get("/live"))[0] == 200


async def test_an_engine_that_starts_its_workers_again_lives_but_is_not_ready(
    server: Server,
) -> None:
    server.replica.lose("died")
    status, headers, body = await server.get("/health")
    assert status == 503
    assert int(headers["retry-after"]) > 0
    assert body["error"]["code"] == "engine_recovering"
    assert (await server.get("/live"))[0] == 200

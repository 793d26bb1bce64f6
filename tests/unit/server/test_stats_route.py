"""`GET /stats` over an engine without a model."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from support.fake_model import SPEC, Ascii
from support.fake_replica import FakeReplica, make_workers

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.live.snapshot import LiveStats
from saqqara.cluster.server.api_keys import ApiKeys
from saqqara.cluster.server.app import make_app
from saqqara.cluster.server.generation import Generation
from saqqara.cluster.settings import serve_config
from saqqara.configs.schema import EngineConfig

KEY = "sk-of-the-test"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A client, with the key, of a server."""
    config = EngineConfig(
        model="fake", executor="ray", max_num_seqs=4, retention="pyramidkv", budget=40
    )
    tokenizer = Tokenizer(Ascii())
    engine = Engine(config, FakeReplica(make_workers(1000)), tokenizer, SPEC, model_name="m")
    serve = serve_config({"model_loading_config": {"model_id": "m", "model_source": "fake"}})
    generation = Generation(serve, config, engine, tokenizer)
    (tmp_path / "keys").write_text(KEY)
    app = make_app(generation, ApiKeys.load(str(tmp_path / "keys")))
    headers = {"Authorization": f"Bearer {KEY}"}
    with TestClient(app, base_url="http://127.0.0.1:8000", headers=headers) as client:
        client.app_state["generation"] = generation
        yield client


def test_stats_tell_what_the_engine_did(client: TestClient) -> None:
    body = {"model": "m", "prompt": "hello", "max_tokens": 5, "ignore_eos": True, "temperature": 0}
    assert (client.post("/v1/completions", json=body)).status_code == 200
    deadline = time.monotonic() + 60
    while not (answer := client.get("/stats")).json()["queue"]["finished"]:
        assert time.monotonic() < deadline, "the engine shows it once it is idle"
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    stats = LiveStats.model_validate(answer.json())
    assert stats.model == "m"
    assert stats.queue.finished == {"length": 1}
    assert stats.throughput.generation_tokens == 5
    assert stats.pyramid.full_tokens == len("hello") + 1
    assert len(stats.pyramid.kept_tokens) == SPEC.num_layers
    assert stats.replica.pid > 0
    assert "NaN" not in json.dumps(answer.json(), allow_nan=False)


def test_stats_need_a_key(client: TestClient) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
        answer = client.get("/stats", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_stats_of_a_dead_engine_are_refused(client: TestClient) -> None:
    client.app_state["generation"].engine.shutdown()
    answer = client.get("/stats")
    assert answer.status_code == 503

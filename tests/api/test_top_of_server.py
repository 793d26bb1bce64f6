"""`saqqara top` of a real server: it needs the key, and the replica says which one it is."""

import io
import time

import pytest
from openai import OpenAI
from support.api_server import KEY, MODEL
from support.server import Server, fetch

from saqqara.cluster.live.snapshot import LiveStats
from saqqara.cluster.top.screen import print_once
from saqqara.cluster.top.source import Address, Source, WrongKeyError


def test_top_shows_the_replica_that_answers(server: Server, client: OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="hello", max_tokens=4)
    source = Source(Address.parse(f"{server.url}/v1"), KEY)
    deadline = time.monotonic() + 60
    while not (stats := source.read()).queue.finished:
        assert time.monotonic() < deadline, "the engine shows it once it is idle"
    assert stats.model == MODEL
    assert stats.replica.id in server.ray_logs(), "the name that Serve's logs have"
    assert [rank.is_alive for rank in stats.ranks] == [True]
    file = io.StringIO()
    print_once(source, as_json=False, file=file)
    assert file.getvalue().startswith(f"{MODEL}  ready  full")
    file = io.StringIO()
    print_once(source, as_json=True, file=file)
    assert LiveStats.model_validate_json(file.getvalue()).replica == stats.replica


def test_stats_are_for_those_with_a_key(server: Server) -> None:
    assert fetch(f"{server.url}/stats").status == 401
    with pytest.raises(WrongKeyError, match="key is wrong"):
        Source(Address.parse(server.url), "sk-other-one").read()

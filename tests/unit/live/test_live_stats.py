"""What an engine shows while it runs is what it does, and reading it disturbs nobody."""

import re
from typing import Any

import numpy as np
import pytest
from support.fake_clock import FakeClock
from support.fake_model import SPEC, Ascii, greedy
from support.fake_replica import PAGE_BYTES, FakeReplica, make_workers
from support.fragile_replica import FragileReplica

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.live.board import WINDOW_SECONDS, Totals, throughput
from saqqara.cluster.request import Request
from saqqara.configs.schema import EngineConfig

NUM_PAGES = 1000


def make(stages: tuple[int, ...] = (4,), **settings: Any) -> tuple[Engine, FakeReplica, FakeClock]:
    config = EngineConfig.model_validate(
        {"model": "fake", "max_num_seqs": 4, "executor": "ray", "prefix_caching": False} | settings
    )
    clock = FakeClock()
    replica = FakeReplica(make_workers(NUM_PAGES, stages=stages))
    engine = Engine(
        config, replica, Tokenizer(Ascii()), SPEC, clock=clock, model_name="m", replica_id="r1"
    )
    return engine, replica, clock


def step(engine: Engine, clock: FakeClock, seconds: float = 1.0) -> None:
    clock.time += seconds
    engine.step()


def rows_by_layer(replica: FakeReplica) -> list[float]:
    """Mean length of a sequence's rows in each layer, counted row by row."""
    by_layer: dict[int, list[int]] = {layer: [] for layer in range(SPEC.num_layers)}
    for worker in replica.fakes:
        for rows in worker.rows.values():
            for (layer, _), length in rows.items():
                by_layer[layer].append(length)
    return [float(np.mean(lengths)) for lengths in by_layer.values()]


@pytest.mark.parametrize(
    "retention",
    [
        "full",
        {"method": "snapkv", "budget": 24, "window": 4},
        {"method": "pyramidkv", "budget": 24, "window": 4},
        {"method": "snapkv", "budget": 24, "window": 4, "decode": True},
        "pyramidinfer",
    ],
    ids=str,
)
def test_the_pyramid_is_what_the_rows_hold(retention: Any) -> None:
    engine, replica, clock = make(retention=retention)
    lengths = {"a": 80, "b": 60, "c": 40}
    for name, length in lengths.items():
        params = greedy(max_tokens=40, ignore_eos=True)
        engine.add(Request(name, tuple(range(5, 5 + length)), params))
    num_live = 0
    while engine.has_unfinished():
        step(engine, clock)
        pyramid = engine.live_stats().pyramid
        held = [s for s in replica.slots.values() if s.prefilled_layers == SPEC.num_layers]
        if len(held) == len(replica.slots) == pyramid.num_sequences and held and pyramid.is_live:
            num_live += 1
            assert pyramid.kept_tokens == pytest.approx(rows_by_layer(replica))
            fed = [slot.fed for slot in held]
            assert pyramid.full_tokens == pytest.approx(np.mean(fed))
            kv = engine.live_stats().kv_cache
            assert kv.full_tokens == sum(fed)
            assert kv.kept_tokens == pytest.approx(np.mean(pyramid.kept_tokens) * len(held))
            pages = sum(worker.info.num_pages - worker.pages_free for worker in replica.fakes)
            assert kv.num_pages - kv.pages_free == pages
            assert kv.kept_bytes == pages * PAGE_BYTES
    assert num_live > 30
    if retention == "full":
        assert kv.kept_bytes == kv.full_bytes > 0


def test_an_idle_engine_shows_the_last_pyramid_and_holds_nothing() -> None:
    engine, _, clock = make(retention="pyramidkv", budget=40)
    stats = engine.live_stats()
    assert (stats.model, stats.replica.id, stats.is_ready) == ("m", "r1", True)
    assert stats.retention == engine.retention.label
    assert stats.pyramid.kept_tokens == [0.0] * SPEC.num_layers
    engine.add(Request("a", tuple(range(5, 105)), greedy(max_tokens=3, ignore_eos=True)))
    while engine.has_unfinished():
        step(engine, clock, 0.01)  # faster than anything but the end is shown
    stats = engine.live_stats()
    assert not stats.pyramid.is_live
    assert stats.pyramid.full_tokens == 100
    kept = stats.pyramid.kept_tokens
    assert kept[0] > kept[-1]
    assert sum(kept) == pytest.approx(40 * SPEC.num_layers)
    assert (stats.kv_cache.kept_tokens, stats.kv_cache.kept_bytes) == (0, 0)
    assert stats.kv_cache.pages_free == stats.kv_cache.num_pages == NUM_PAGES
    assert (stats.queue.running, stats.queue.waiting) == (0, 0)
    assert stats.queue.finished == {"length": 1}


def test_who_runs_and_who_waits() -> None:
    engine, _, clock = make(max_num_seqs=2)
    for name in "abc":
        engine.add(Request(name, "hello", greedy(max_tokens=20, ignore_eos=True)))
    step(engine, clock)
    queue = engine.live_stats().queue
    assert (queue.running, queue.waiting) == (2, 1)


def test_ranks_and_their_seconds() -> None:
    engine, _, clock = make(stages=(1, 3))
    engine.add(Request("a", "hello", greedy(max_tokens=4, ignore_eos=True)))
    while engine.has_unfinished():
        step(engine, clock)
    ranks = engine.live_stats().ranks
    num_steps = engine.report().num_steps
    assert [rank.layers for rank in ranks] == [(0, 1), (1, 4)]
    for rank in ranks:
        assert rank.is_alive
        assert rank.hostname == "localhost"
        assert rank.seconds["decode"] == 0.5 * num_steps  # what the fake says of every step
    text = engine.metrics.render()
    for line in [
        f'saqqara:worker_seconds_total{{model_name="m",phase="decode",worker="1"}} {num_steps / 2}',
        'saqqara:workers{model_name="m"} 2.0',
        'saqqara:workers_alive{model_name="m"} 2.0',
    ]:
        assert line in text
    engine.reset_stats()
    assert engine.live_stats().ranks == ranks, "they go on, whatever is reset"


def test_the_snapshot_follows_a_few_times_a_second() -> None:
    engine, _, clock = make()
    engine.add(Request("a", "hello", greedy(max_tokens=50, ignore_eos=True)))
    times = set()
    for _ in range(20):
        step(engine, clock, 0.1)
        times.add(engine.live_stats().time)
    assert len(times) in (4, 5)


def test_throughput_is_that_of_the_window() -> None:
    busy = tuple(Totals(t / 2, 100 * t, 10 * t) for t in range(21))  # until 10 s
    found = throughput(busy, 10.0)
    assert found.prompt_tokens_per_second == pytest.approx(200)
    assert found.generation_tokens_per_second == pytest.approx(20)
    assert (found.prompt_tokens, found.generation_tokens) == (2000, 200)
    half = throughput(busy, 10.0 + WINDOW_SECONDS / 2)  # idle since
    assert half.generation_tokens_per_second == pytest.approx(10)
    assert throughput(busy, 60.0).generation_tokens_per_second == 0
    # A burst after a long rest is not spread over the rest.
    burst = (Totals(0, 0, 0), Totals(100, 0, 0), Totals(101, 0, 50))
    assert throughput(burst, 101.0).generation_tokens_per_second == pytest.approx(50 / 5.5)
    assert throughput((Totals(0, 0, 0),), 0.0).generation_tokens_per_second == 0


def test_throughput_of_an_engine() -> None:
    engine, _, clock = make()
    engine.add(Request("a", "hello", greedy(max_tokens=100, ignore_eos=True)))
    for _ in range(60):
        step(engine, clock, 0.25)
    found = engine.live_stats().throughput
    assert found.generation_tokens_per_second == pytest.approx(4, rel=0.15)
    assert found.prompt_tokens == len("hello") + 1
    clock.time += 100
    assert engine.live_stats().throughput.generation_tokens_per_second == 0


def test_a_lost_rank_is_seen_at_once_and_so_is_the_recovery() -> None:
    clock = FakeClock()
    replica = FragileReplica(make_workers(NUM_PAGES, stages=(2, 2)), {2: "died"}, failing_starts=2)
    clock.on_wait = replica.tick
    config = EngineConfig(model="fake", executor="ray")
    engine = Engine(config, replica, Tokenizer(Ascii()), SPEC, clock=clock)
    engine.add(Request("a", "hello", greedy(max_tokens=9, ignore_eos=True)))
    while engine.is_ready:
        engine.step()
    stats = engine.live_stats()
    assert not stats.is_ready
    assert [rank.is_alive for rank in stats.ranks] == [False, False]
    assert [rank.times_lost for rank in stats.ranks] == [0, 1], "the fake says which"
    assert stats.queue.waiting == 1
    text = engine.metrics.render()
    part = 'device="cpu",hostname="localhost",kv_heads="0-1"'
    gone = f'saqqara:worker_info{{{part},layers="2-3",model_name="fake",worker="1"}}'
    for line in [
        'saqqara:workers{model_name="fake"} 2.0',
        'saqqara:workers_alive{model_name="fake"} 0.0',
        'saqqara:workers_lost_total{cause="died",model_name="fake",worker="1"} 1.0',
        f"{gone} 0.0",
    ]:
        assert line in text
    while replica.num_starts == 0 or replica.failure is not None:
        engine.step()
    engine.step()
    stats = engine.live_stats()
    assert stats.is_ready
    assert all(rank.is_alive for rank in stats.ranks)
    assert stats.recoveries.by_cause == {"died": 1}
    assert stats.recoveries.down_seconds > 0
    text = engine.metrics.render()
    assert 'saqqara:workers_alive{model_name="fake"} 2.0' in text
    assert f"{gone} 1.0" in text
    while engine.has_unfinished():
        engine.step()
    assert engine.live_stats().queue.finished == {"length": 1}
    found = dict(re.findall(r"(vllm:request_\w+_time_seconds_sum){[^}]*} (\S+)", text))
    assert set(found) == {
        f"vllm:request_{name}_time_seconds_sum"
        for name in ("queue", "prefill", "decode", "inference")
    }


def test_what_was_never_begun_has_no_times() -> None:
    engine, _, clock = make(max_num_seqs=1)
    for name in "ab":
        engine.add(Request(name, "hello", greedy(max_tokens=30, ignore_eos=True)))
    step(engine, clock)
    engine.abort("b")
    while engine.has_unfinished():
        step(engine, clock)
    text = engine.metrics.render()

    def value(name: str) -> float:
        [found] = re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)", text, re.M)
        return float(found)

    assert value("e2e_request_latency_seconds_count") == 2
    for name in ("queue", "prefill", "decode", "inference"):
        assert value(f"request_{name}_time_seconds_count") == 1, name
    assert value("request_queue_time_seconds_sum") <= 1
    assert value("request_decode_time_seconds_sum") == 29  # a step takes a second
    assert value("request_time_per_output_token_seconds_sum") == 1
    assert value("request_generation_tokens_sum") == 30
    assert value("iteration_tokens_total_sum") == 30 + len("hello") + 1
    assert value("prefix_cache_queries_total") == len("hello") + 1

"""Boards made for vLLM have data in every panel: a real Prometheus scrapes a real engine."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.byte_llama import save_tiny_llama
from support.prometheus import query, running, wait_for
from support.vllm_boards import BOARDS

from saqqara.cluster.engine.client import LocalClient
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig

NUM_REQUESTS, NUM_CHOICES = 3, 2
COUNT = "sum(vllm:request_success_total)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("boards-llama")
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[LocalClient]:
    """An engine in this process, with its metrics on a port."""
    config = EngineConfig(
        model=str(model),
        load_format="dummy",
        dtype="float32",
        device="cpu",
        max_model_len=256,
        max_num_seqs=8,
        kv_memory_gib=0.02,
        num_threads=1,
        retention="pyramidkv",
        budget=48,
        metrics_port=0,
    )
    client = LocalClient(config)
    yield client
    client.shutdown()


def serve(client: LocalClient, name: str) -> None:
    """Have some requests answered."""
    sampling = SamplingParams(max_tokens=8, n=NUM_CHOICES, ignore_eos=True)
    prompt = tuple(range(1, 101))
    requests = [Request(f"{name}{i}", prompt, sampling) for i in range(NUM_REQUESTS)]
    assert client.submit(requests) == []
    left = {request.request_id for request in requests}
    while left:
        left -= {output.request_id for output in client.poll(60)}
    client.report()


@pytest.fixture(scope="module")
def prometheus(client: LocalClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has seen requests twice, so that it knows rates."""
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [
            {"job_name": "vllm", "static_configs": [{"targets": [client.metrics_address()]}]}
        ],
    }
    serve(client, "warm-up")  # what a counter's first value is made of is no rate
    with running(config, tmp_path_factory.mktemp("prometheus"), num_targets=1) as address:
        for round_ in (2, 3):
            serve(client, f"{round_}/")
            total = round_ * NUM_REQUESTS
            wait_for(lambda total=total: value(address, COUNT) == total)  # type: ignore[misc]
        yield address


def value(address: str, expression: str) -> float:
    [series] = query(address, expression)
    return float(series["value"][1])


@pytest.mark.parametrize("board", BOARDS)
def test_every_panel_of_vllms_boards_has_data(board: str, prometheus: str, model: Path) -> None:
    variables = {
        "$__rate_interval": "1m",
        "$__range": "5m",
        "$model_name": str(model),
        "$Deployment_id": ".*",
    }
    for written in BOARDS[board]:
        expression = written
        for name, chosen in variables.items():
            expression = expression.replace(name, chosen)
        assert "$" not in expression
        found = query(prometheus, expression)
        assert found, f"no data for {expression}"
        for series in found:
            assert math.isfinite(float(series["value"][1])), f"{series} for {expression}"


def test_the_numbers_are_those_of_the_requests(prometheus: str, client: LocalClient) -> None:
    finished = 3 * NUM_REQUESTS
    sequences = finished * NUM_CHOICES
    report = client.report()
    for expression, expected in (
        (COUNT, finished),
        ("vllm:request_prompt_tokens_sum", 100 * finished),
        ("vllm:request_generation_tokens_sum", 8 * sequences),
        ("vllm:generation_tokens_total", 8 * sequences),
        ("vllm:request_max_num_generation_tokens_sum", 8 * finished),
        ("vllm:request_params_n_sum", NUM_CHOICES * finished),
        ("vllm:request_params_max_tokens_sum", 8 * finished),
        ("vllm:iteration_tokens_total_sum", 100 * finished + 8 * sequences),
        ("vllm:prefix_cache_queries_total", 100 * sequences),
        ("vllm:request_queue_time_seconds_count", finished),
        ("vllm:request_inference_time_seconds_count", finished),
        ("vllm:cache_config_info", 1),
    ):
        assert value(prometheus, expression) == expected, expression
    hits = value(prometheus, "vllm:prefix_cache_hits_total")
    assert 100 * finished <= hits < 100 * sequences, "a choice shares its request's prefill"
    times = {
        name: value(prometheus, f"vllm:{name}_seconds_sum")
        for name in ("request_queue_time", "request_prefill_time", "request_decode_time")
    }
    assert min(times.values()) > 0
    inference = value(prometheus, "vllm:request_inference_time_seconds_sum")
    assert inference == pytest.approx(
        times["request_prefill_time"] + times["request_decode_time"], rel=1e-6
    )
    whole = value(prometheus, "vllm:e2e_request_latency_seconds_sum")
    assert whole == pytest.approx(inference + times["request_queue_time"], rel=1e-6)
    [info] = query(prometheus, "vllm:cache_config_info")
    worker = report.workers[0]
    rows = (worker.layers[1] - worker.layers[0]) * (worker.kv_heads[1] - worker.kv_heads[0])
    assert int(info["metric"]["num_gpu_blocks"]) == worker.num_pages // rows
    assert info["metric"]["block_size"] == str(worker.page_tokens)

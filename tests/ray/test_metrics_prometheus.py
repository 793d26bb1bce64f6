"""A real Prometheus scrapes a running engine and agrees with the engine's own report."""

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from support.prometheus import WAIT_SECONDS, query, running, wait_for

from saqqara.cluster.engine.report import EngineReport
from saqqara.cluster.on_ray.controller import ControllerClient, start_controller
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig

# Long prompts and a small budget, so that something is dropped.
RETENTION, BUDGET = "pyramidkv", 48
NUM_REQUESTS, PROMPT_TOKENS = 4, 200


@pytest.fixture(scope="module")
def client(
    ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControllerClient]:
    client = start_controller(
        EngineConfig(
            model=str(tiny_model),
            load_format="dummy",
            dtype="float32",
            device="cpu",
            executor="ray",
            pipeline_parallel_size=2,
            max_model_len=256,
            max_num_seqs=8,
            kv_memory_gib=0.02,
            num_threads=1,
            retention=RETENTION,
            budget=BUDGET,
            metrics_port=0,
            log_dir=str(tmp_path_factory.mktemp("logs")),
        )
    )
    yield client
    client.shutdown()


@pytest.fixture(scope="module")
def prometheus(client: ControllerClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus server that scrapes the engine once a second."""
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [
            {
                "job_name": "saqqara",
                "static_configs": [{"targets": [client.metrics_address()]}],
            }
        ],
    }
    with running(config, tmp_path_factory.mktemp("prometheus"), num_targets=1) as address:
        yield address


@pytest.fixture(scope="module")
def report(client: ControllerClient) -> EngineReport:
    """What the engine says of a run of a few requests."""
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    requests = [
        Request(
            f"{i}",
            prompt=tuple(range(1 + i, 1 + i + PROMPT_TOKENS)),
            sampling_params=sampling,
        )
        for i in range(NUM_REQUESTS)
    ]
    assert client.submit(requests) == []
    left = {request.request_id for request in requests}
    deadline = time.monotonic() + WAIT_SECONDS
    while left and time.monotonic() < deadline:
        left -= {output.request_id for output in client.poll(1)}
    assert not left
    report = client.report()
    assert sum(report.dropped_tokens_by_layer) > 0
    assert report.kept_tokens_by_layer[0] > report.kept_tokens_by_layer[-1], "a pyramid"
    assert report.kv_kept_bytes_peak < report.kv_full_bytes_peak
    return report


def test_prometheus_sees_the_kept_kv_that_the_report_tells(
    report: EngineReport, prometheus: str
) -> None:
    def by_layer(name: str) -> tuple[int, ...]:
        series = query(prometheus, f'{name}{{method="{RETENTION}"}}')
        values = {int(s["metric"]["layer"]): int(float(s["value"][1])) for s in series}
        return tuple(values[layer] for layer in sorted(values))

    # Scraped once a second, so the last values come a moment after the run.
    wait_for(lambda: by_layer("saqqara:kept_tokens_total") == report.kept_tokens_by_layer)
    assert by_layer("saqqara:dropped_tokens_total") == report.dropped_tokens_by_layer
    for name, value in (
        ("saqqara:kv_kept_bytes_peak", report.kv_kept_bytes_peak),
        ("saqqara:kv_full_bytes_peak", report.kv_full_bytes_peak),
        ("vllm:generation_tokens_total", report.generation_tokens),
        ("vllm:prompt_tokens_total", NUM_REQUESTS * PROMPT_TOKENS),
        ('vllm:request_success_total{finished_reason="length"}', NUM_REQUESTS),
        ("sum(saqqara:pages_free)", sum(w.pages_free for w in report.workers)),
        ("count(saqqara:pages_free)", 2),
    ):
        [series] = query(prometheus, name)
        assert float(series["value"][1]) == value, name


def test_ray_exports_the_same_numbers_under_its_own_names(report: EngineReport) -> None:
    [node] = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def by_layer(name: str) -> tuple[int, ...]:
        with urllib.request.urlopen(url, timeout=5) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        samples = [s for family in families for s in family.samples if s.name == name]
        values = {int(s.labels["layer"]): int(s.value) for s in samples}
        return tuple(values[layer] for layer in sorted(values))

    # The actor reports to Ray's agent every few seconds.
    wait_for(lambda: by_layer("ray_saqqara_kept_tokens_total") == report.kept_tokens_by_layer)

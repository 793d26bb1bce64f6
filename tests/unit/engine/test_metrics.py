"""One table of metrics feeds any number of sinks; Prometheus is the one that is always there."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from saqqara.cluster.engine.metrics import Metrics, PrometheusSink
from saqqara.cluster.live.families import METRICS, SPECS, MetricSpec

VLLM_NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_success",
    "vllm:num_preemptions",
    "vllm:request_queue_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_max_num_generation_tokens",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
    "vllm:iteration_tokens_total",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:cache_config_info",
}


@pytest.fixture
def sink() -> Iterator[PrometheusSink]:
    sink = PrometheusSink("tiny")
    yield sink
    sink.close()


def test_numbers_reach_prometheus_with_the_model_name(sink: PrometheusSink) -> None:
    metrics = Metrics([sink])
    metrics.inc("vllm:prompt_tokens", 30)
    metrics.inc("vllm:request_success", 2, "length")
    metrics.set("saqqara:pages_free", 7, "3")
    metrics.observe("vllm:time_to_first_token_seconds", 0.3)
    text = sink.render()
    assert 'vllm:prompt_tokens_total{model_name="tiny"} 30.0' in text
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 2.0' in text
    assert 'saqqara:pages_free{model_name="tiny",worker="3"} 7.0' in text
    assert 'vllm:time_to_first_token_seconds_bucket{le="0.25",model_name="tiny"} 0.0' in text
    assert 'vllm:time_to_first_token_seconds_bucket{le="0.5",model_name="tiny"} 1.0' in text


def test_series_exist_before_anything_happens(sink: PrometheusSink) -> None:
    text = sink.render()
    assert 'vllm:num_preemptions_total{model_name="tiny"} 0.0' in text
    for reason in ("stop", "length", "abort", "error"):
        assert f'finished_reason="{reason}",model_name="tiny"}} 0.0' in text


def test_the_table_is_well_formed() -> None:
    assert len(SPECS) == len(METRICS)
    assert {name for name in SPECS if name.startswith("vllm:")} == VLLM_NAMES
    for spec in METRICS:
        assert re.fullmatch(r"(vllm|saqqara):[a-z0-9_]+", spec.name)
        assert spec.help.endswith(".")
        assert (spec.kind == "histogram") == bool(spec.buckets)
        assert list(spec.buckets) == sorted(set(spec.buckets))
        assert not spec.first_values or len(spec.labels) == 1


def test_every_sink_gets_every_number() -> None:
    class List:
        def __init__(self) -> None:
            self.calls: list[tuple[str, str, float, tuple[str, ...]]] = []

        def inc(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
            self.calls.append(("inc", spec.name, value, labels))

        def set(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
            self.calls.append(("set", spec.name, value, labels))

        def observe(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
            self.calls.append(("observe", spec.name, value, labels))

    sinks = [List(), List()]
    metrics = Metrics(sinks)
    metrics.inc("vllm:num_preemptions")
    metrics.set("vllm:num_requests_running", 3)
    metrics.observe("saqqara:step_seconds", 0.1, "decode")
    expected = [
        ("inc", "vllm:num_preemptions", 1, ()),
        ("set", "vllm:num_requests_running", 3, ()),
        ("observe", "saqqara:step_seconds", 0.1, ("decode",)),
    ]
    assert [sink.calls for sink in sinks] == [expected, expected]


def test_wrong_use_is_caught(sink: PrometheusSink) -> None:
    metrics = Metrics([sink])
    with pytest.raises(KeyError):
        metrics.inc("vllm:no_such_metric")
    with pytest.raises(AssertionError, match="is a counter, not a gauge"):
        metrics.set("vllm:prompt_tokens", 1)
    with pytest.raises(AssertionError, match="has the labels"):
        metrics.set("saqqara:pages_free", 1)


def test_metrics_are_served_on_a_free_port(sink: PrometheusSink) -> None:
    port = sink.start_http_server(0)
    assert port > 0
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        assert b"vllm:num_requests_running" in response.read()
    foreign = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Host": f"evil.com:{port}"}
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign, timeout=10)
    sink.close()
    sink.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


def test_two_engines_in_a_process_do_not_collide(sink: PrometheusSink) -> None:
    other = PrometheusSink("tiny")
    Metrics([other]).inc("vllm:generation_tokens", 5)
    assert 'vllm:generation_tokens_total{model_name="tiny"} 0.0' in sink.render()

"""What Grafana boards that come with vLLM ask Prometheus.

Not the boards: the expressions of their panels, written from the names, labels and functions that
they use. The boards are `examples/observability/prometheus_grafana/grafana.json`, and
`performance_statistics.json` and `query_statistics.json` of `.../dashboards/grafana/`.
"""

from collections.abc import Iterator

_LATENCIES = (
    "vllm:e2e_request_latency_seconds",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
)


def _quantile(share: str, histogram: str, chosen: str, window: str, by: str = "le") -> str:
    rate = f"rate({histogram}_bucket{chosen}[{window}])"
    return f"histogram_quantile({share}, sum by({by}) ({rate}))"


def _mean(function: str, histogram: str, chosen: str, window: str) -> str:
    parts = [f"{function}({histogram}_{part}{chosen}[{window}])" for part in ("sum", "count")]
    return " / ".join(parts)


def _grafana() -> Iterator[str]:
    """The board that vLLM's documentation of Prometheus and Grafana starts with."""
    chosen, window = '{model_name="$model_name"}', "$__rate_interval"
    for histogram in _LATENCIES:
        for share in ("0.99", "0.95", "0.9", "0.5"):
            yield _quantile(share, histogram, chosen, window)
        yield _mean("rate", histogram, chosen, window)
    for counter in ("prompt_tokens", "generation_tokens"):
        yield f"rate(vllm:{counter}_total{chosen}[{window}])"
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        yield f"vllm:{gauge}{chosen}"
    for histogram in ("request_prompt_tokens", "request_generation_tokens"):
        yield f"sum by(le) (increase(vllm:{histogram}_bucket{chosen}[{window}]))"
    yield f"sum by(finished_reason) (increase(vllm:request_success_total{chosen}[{window}]))"
    for histogram in (
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_max_num_generation_tokens",
    ):
        yield f"rate(vllm:{histogram}_sum{chosen}[{window}])"


def _performance_statistics() -> Iterator[str]:
    """Latencies over time and over the range that is shown; it chooses no model."""
    for histogram in _LATENCIES:
        yield _mean("rate", histogram, "", "$__rate_interval")
        for share in ("0.99", "0.90", "0.50"):
            yield _quantile(share, histogram, "", "$__range")
        parts = [f"sum(increase({histogram}_{part}[$__range]))" for part in ("sum", "count")]
        yield f"({' / '.join(parts)})"
    for share in ("0.50", "0.90", "0.99"):
        yield _quantile(share, "vllm:inter_token_latency_seconds", "", "$__rate_interval")
    for counter in (
        "generation_tokens_total",
        "prompt_tokens_total",
        "iteration_tokens_total_count",
    ):
        yield f"rate(vllm:{counter}[$__rate_interval])"


def _query_statistics() -> Iterator[str]:
    """Requests and their sizes, by model."""
    chosen, window = '{model_name=~"$Deployment_id"}', "$__rate_interval"
    for counter in ("request_success", "prompt_tokens", "generation_tokens"):
        rate = f"rate(vllm:{counter}_total{chosen}[{window}])"
        yield f"sum by (model_name) ({rate})"
        yield f"sum({rate})"
    for histogram in ("vllm:e2e_request_latency_seconds", "vllm:request_prompt_tokens"):
        for share in ("0.50", "0.90", "0.99"):
            yield _quantile(share, histogram, chosen, window, by="le, model_name")
    yield f"sum by (le, model_name) (rate(vllm:request_prompt_tokens_bucket{chosen}[{window}]))"
    sums = [
        f"sum(rate(vllm:{counter}_total{chosen}[{window}]))"
        for counter in ("prompt_tokens", "request_success")
    ]
    yield " / ".join(sums)


# What labels and tools beside those boards ask for: KEDA scalers, the docs' own examples.
_OTHERS = (
    'sum(vllm:num_requests_waiting{model_name="$model_name"})',
    'sum(vllm:num_requests_waiting_by_reason{reason="capacity"})',
    "rate(vllm:request_time_per_output_token_seconds_sum[$__rate_interval])",
    "rate(vllm:request_inference_time_seconds_sum[$__rate_interval])",
    "histogram_quantile(0.9, sum by(le) (rate(vllm:request_params_n_bucket[$__rate_interval])))",
    "histogram_quantile(0.9, sum by(le) "
    "(rate(vllm:request_params_max_tokens_bucket[$__rate_interval])))",
    "sum(rate(vllm:prefix_cache_hits_total[$__rate_interval])) / "
    "(sum(rate(vllm:prefix_cache_queries_total[$__rate_interval])) > 0)",
    "sum(rate(vllm:num_preemptions_total[$__rate_interval]))",
    'vllm:cache_config_info{block_size!="", cache_dtype!="", num_gpu_blocks!=""}',
)

BOARDS: dict[str, tuple[str, ...]] = {
    "grafana": tuple(_grafana()),
    "performance_statistics": tuple(_performance_statistics()),
    "query_statistics": tuple(_query_statistics()),
    "others": _OTHERS,
}

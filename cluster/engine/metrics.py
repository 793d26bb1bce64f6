"""Every counter, gauge and histogram of an engine, in one table, and where the numbers go.

`METRICS` is plain data, so any number of sinks can be built from it: Prometheus here, Ray's own
metrics in the controller. Names that start with `vllm:` mean what they mean in vLLM, so its
dashboards work; what only Saqqara has starts with `saqqara:`.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import prometheus_client
from prometheus_client import CollectorRegistry

from saqqara.cluster.errors import Cause

Kind = Literal["counter", "gauge", "histogram"]

MODEL_LABEL = "model_name"

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_NEXT_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric; every metric also has the label `model_name`.

    `first_values` are values of its (only) label whose series exist, at zero, from the start.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    first_values: tuple[str, ...] = ()


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("vllm:num_requests_running", "gauge", "Sequences in prefill or decode."),
    MetricSpec("vllm:num_requests_waiting", "gauge", "Sequences waiting for a slot."),
    MetricSpec(
        "vllm:kv_cache_usage_perc",
        "gauge",
        "Share of the KV pages in use, 1 = all, of the worker with the least free.",
    ),
    MetricSpec("vllm:prompt_tokens", "counter", "Prompt tokens prefilled, each request once."),
    MetricSpec("vllm:generation_tokens", "counter", "Tokens generated."),
    MetricSpec(
        "vllm:time_to_first_token_seconds",
        "histogram",
        "From arrival to the first token.",
        buckets=_FIRST_TOKEN,
    ),
    MetricSpec(
        "vllm:inter_token_latency_seconds",
        "histogram",
        "Between two tokens of one sequence.",
        buckets=_NEXT_TOKEN,
    ),
    MetricSpec(
        "vllm:e2e_request_latency_seconds",
        "histogram",
        "From arrival to the last token.",
        buckets=_REQUEST,
    ),
    MetricSpec(
        "vllm:request_success",
        "counter",
        "Finished requests by reason.",
        labels=("finished_reason",),
        first_values=("stop", "length", "abort", "error"),
    ),
    MetricSpec("vllm:num_preemptions", "counter", "Sequences that lost their slot for a while."),
    MetricSpec(
        "saqqara:num_refusals", "counter", "Sequences that a worker had no pages for in a step."
    ),
    MetricSpec("saqqara:scored_tokens", "counter", "Continuation tokens scored."),
    MetricSpec(
        "saqqara:kept_tokens",
        "counter",
        "Prompt tokens kept after prefill, summed over kv heads.",
        labels=("layer", "method"),
    ),
    MetricSpec(
        "saqqara:dropped_tokens",
        "counter",
        "Prompt tokens dropped after prefill, summed over kv heads.",
        labels=("layer", "method"),
    ),
    MetricSpec("saqqara:kv_kept_bytes", "gauge", "Bytes of KV pages that sequences hold."),
    MetricSpec("saqqara:kv_full_bytes", "gauge", "Bytes they would hold under full retention."),
    MetricSpec("saqqara:kv_kept_bytes_peak", "gauge", "Most bytes of KV pages held at once."),
    MetricSpec(
        "saqqara:kv_full_bytes_peak", "gauge", "What full retention would have held at that moment."
    ),
    MetricSpec("saqqara:num_pages", "gauge", "KV pages of the pool.", labels=("worker",)),
    MetricSpec("saqqara:pages_free", "gauge", "Free KV pages.", labels=("worker",)),
    MetricSpec(
        "saqqara:pages_leaked",
        "gauge",
        "Pages not free when nothing was left to do, the last time that was so; always 0.",
    ),
    MetricSpec(
        "saqqara:step_seconds",
        "histogram",
        "Time of a step on its slowest worker, by phase.",
        labels=("phase",),
        buckets=_STEP,
    ),
    MetricSpec(
        "saqqara:worker_memory_bytes",
        "gauge",
        "Bytes on a worker: weights, pool, parked activations, query rings, peaks, resident.",
        labels=("worker", "kind"),
    ),
    MetricSpec(
        "saqqara:recoveries",
        "counter",
        "Times that lost workers were started again, by how they were lost.",
        labels=("cause",),
        first_values=get_args(Cause),
    ),
    MetricSpec("saqqara:down_seconds", "counter", "Seconds without workers until they were back."),
    MetricSpec("saqqara:ready", "gauge", "1: there are workers; 0: they are started again."),
    MetricSpec("saqqara:batch_rows", "gauge", "Rows of the batch job's input; 0: no batch job."),
    MetricSpec("saqqara:batch_rows_left", "gauge", "Rows of the batch job without a record."),
    MetricSpec(
        "saqqara:batch_rows_done",
        "counter",
        "Records that batch jobs wrote, by outcome.",
        labels=("outcome",),
        first_values=("answered", "error"),
    ),
)

SPECS: Mapping[str, MetricSpec] = {spec.name: spec for spec in METRICS}


class Sink(Protocol):
    """Where numbers go. `labels` are in the order of the metric's own, without `model_name`."""

    def inc(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        """Add to a counter."""
        ...

    def set(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        """Set a gauge."""
        ...

    def observe(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        """Add a value to a histogram."""
        ...


class Metrics:
    """Sends numbers to every sink, under the names of `METRICS`."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def inc(self, name: str, value: float = 1, *labels: str) -> None:
        """Add to a counter."""
        spec = _spec(name, "counter", labels)
        for sink in self._sinks:
            sink.inc(spec, value, labels)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        spec = _spec(name, "gauge", labels)
        for sink in self._sinks:
            sink.set(spec, value, labels)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        spec = _spec(name, "histogram", labels)
        for sink in self._sinks:
            sink.observe(spec, value, labels)


def _spec(name: str, kind: Kind, labels: tuple[str, ...]) -> MetricSpec:
    spec = SPECS[name]
    assert spec.kind == kind, f"{name} is a {spec.kind}, not a {kind}"
    assert len(labels) == len(spec.labels), f"{name} has the labels {spec.labels}, not {labels}"
    return spec


class PrometheusSink:
    """Prometheus metrics in a registry of their own, served over HTTP on request.

    Args:
        model_name: value of the label `model_name`.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._metrics = {spec.name: self._make(spec) for spec in METRICS}
        self._children: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._server: tuple[Any, threading.Thread] | None = None
        for spec in METRICS:
            for value in spec.first_values:
                self._child(spec, (value,))
            if not spec.labels:
                self._child(spec, ())

    def inc(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        """Add to a counter."""
        self._child(spec, labels).inc(value)

    def set(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        """Set a gauge."""
        self._child(spec, labels).set(value)

    def observe(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        """Add a value to a histogram."""
        self._child(spec, labels).observe(value)

    def render(self) -> str:
        """The metrics in the Prometheus text format."""
        return prometheus_client.generate_latest(self.registry).decode()

    def start_http_server(self, port: int = 0, host: str = "127.0.0.1") -> int:
        """Serve /metrics in a thread and return the port (0 takes any free one).

        Raises:
            OSError: the port is taken.
        """
        assert self._server is None, "the metrics are already served"
        server, thread = prometheus_client.start_http_server(port, host, self.registry)
        # Prometheus asks for OpenMetrics, in which prometheus_client (0.26) writes `_` for the `:`
        # of a name; the plain text format keeps it.
        app = server.get_app()
        assert app is not None
        server.set_app(lambda environ, start: app({**environ, "HTTP_ACCEPT": "text/plain"}, start))
        self._server = (server, thread)
        return int(server.server_port)

    def close(self) -> None:
        """Stop serving; calling it again does nothing."""
        if self._server is None:
            return
        server, thread = self._server
        self._server = None
        server.shutdown()
        server.server_close()
        thread.join()

    def _make(self, spec: MetricSpec) -> Any:
        names = (MODEL_LABEL, *spec.labels)
        if spec.kind == "histogram":
            return prometheus_client.Histogram(
                spec.name, spec.help, names, registry=self.registry, buckets=spec.buckets
            )
        make = prometheus_client.Counter if spec.kind == "counter" else prometheus_client.Gauge
        return make(spec.name, spec.help, names, registry=self.registry)

    def _child(self, spec: MetricSpec, labels: tuple[str, ...]) -> Any:
        key = (spec.name, labels)
        if key not in self._children:
            self._children[key] = self._metrics[spec.name].labels(self._model_name, *labels)
        return self._children[key]

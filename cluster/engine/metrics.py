"""Where an engine's numbers go: to every sink, under the names of `live/families.py`."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import prometheus_client
from prometheus_client import CollectorRegistry

from saqqara.cluster.live.door import EngineDoor
from saqqara.cluster.live.families import METRICS, MODEL_LABEL, SPECS, Kind, MetricSpec
from saqqara.cluster.live.snapshot import LiveStats
from saqqara.configs.schema import EngineConfig
from saqqara.workers.plan import WorkerInfo


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


def cache_config_labels(config: EngineConfig, workers: Sequence[WorkerInfo]) -> tuple[str, ...]:
    """How the cache is made, in vLLM's words; a block of its spans all layers and heads."""
    rows = ((w.stop_layer - w.start_layer) * (w.stop_head - w.start_head) for w in workers)
    pairs = zip(workers, rows, strict=True)
    return (
        str(workers[0].page_tokens),
        workers[0].dtype,
        str(config.prefix_caching),
        str(config.memory_utilization),
        str(min(worker.num_pages // num_rows for worker, num_rows in pairs)),
    )


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

    def start_http_server(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        read_stats: Callable[[], LiveStats] | None = None,
    ) -> int:
        """Serve /metrics, and with `read_stats` /stats, in a thread; returns the port.

        Args:
            port: 0 takes any free one.
            host: address to listen on.
            read_stats: what the engine shows.

        Raises:
            OSError: the port is taken.
        """
        assert self._server is None, "the metrics are already served"
        server, thread = prometheus_client.start_http_server(port, host, self.registry)
        # Prometheus asks for OpenMetrics, in which prometheus_client (0.26) writes `_` for the `:`
        # of a name; the plain text format keeps it.
        app: Any = server.get_app()
        assert app is not None

        def plain(environ: Mapping[str, Any], start: Any) -> Any:
            return app({**environ, "HTTP_ACCEPT": "text/plain"}, start)

        server.set_app(cast(Any, EngineDoor(plain, host, read_stats)))
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

"""An engine's metrics as Ray's own, which Ray's agents export on every node."""

import threading
import time
import weakref
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from saqqara.cluster.live.families import METRICS, MODEL_LABEL, MetricSpec

_REPEAT_SECONDS = 2.0  # well within Ray's interval of reports, which is 10 s


class RaySink:
    """Sends an engine's metrics to Ray, whose agent exports them as `ray_<name>` on every node.

    Ray does not scrape what `prometheus_client` holds in an actor, so operators who collect Ray's
    own endpoints would miss the engine without this. A `:` is `_` here, as Ray's names have none,
    and the sums of Ray's histograms are estimates from their buckets. The agent forgets a gauge
    that is not set again from report to report, so all are, also while the engine is idle.

    Args:
        model_name: value of the label `model_name`.
    """

    def __init__(self, model_name: str) -> None:
        self._metrics = {spec.name: self._make(spec, model_name) for spec in METRICS}
        self._gauges: dict[tuple[str, tuple[str, ...]], tuple[float, dict[str, str]]] = {}
        self._lock = threading.Lock()  # else an old value may be repeated after a new one
        threading.Thread(
            target=_repeat_gauges, args=(weakref.ref(self),), name="repeat-gauges", daemon=True
        ).start()

    def inc(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        """Add to a counter."""
        if value > 0:  # Ray refuses to add nothing
            self._metrics[spec.name].inc(value, tags=_tags(spec, labels))

    def set(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        """Set a gauge."""
        tags = _tags(spec, labels)
        with self._lock:
            self._gauges[spec.name, labels] = value, tags
            self._metrics[spec.name].set(value, tags=tags)

    def repeat_gauges(self) -> None:
        """Set every gauge to what it is."""
        with self._lock:
            for (name, _), (value, tags) in self._gauges.items():
                self._metrics[name].set(value, tags=tags)

    def observe(self, spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        """Add a value to a histogram."""
        self._metrics[spec.name].observe(value, tags=_tags(spec, labels))

    @staticmethod
    def _make(spec: MetricSpec, model_name: str) -> Any:
        name = spec.name.replace(":", "_")
        keys = (MODEL_LABEL, *spec.labels)
        metric: Any
        if spec.kind == "histogram":
            metric = Histogram(name, spec.help, boundaries=list(spec.buckets), tag_keys=keys)
        else:
            metric = (Counter if spec.kind == "counter" else Gauge)(name, spec.help, tag_keys=keys)
        metric.set_default_tags({MODEL_LABEL: model_name})
        return metric


def _tags(spec: MetricSpec, labels: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(spec.labels, labels, strict=True))


def _repeat_gauges(sink: "weakref.ref[RaySink]") -> None:
    """Thread: repeats the gauges as long as there is the sink."""
    while (found := sink()) is not None:
        found.repeat_gauges()
        del found
        time.sleep(_REPEAT_SECONDS)

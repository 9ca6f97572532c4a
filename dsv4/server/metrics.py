"""GET /metrics: the engine's metrics in Prometheus' text format, through prometheus_client (extra `server`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.responses import Response

from dsv4.engine.metrics import Histogram, Metric, MetricRegistry
from dsv4.server.errors import RequestError

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family


def metrics_router(metrics: MetricRegistry, model_name: str) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    def prometheus() -> Response:  # pyright: ignore[reportUnusedFunction]
        """The metrics now. 501 where prometheus_client is not installed."""
        try:
            from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        except ImportError as error:
            missing = "metrics need prometheus_client: pip install 'dsv4[server]'"
            raise RequestError(501, missing, headers={"x-should-retry": "false"}) from error
        registry = CollectorRegistry(auto_describe=False)
        registry.register(MetricCollector(metrics, model_name))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


class MetricCollector:
    """A collector of prometheus_client. Every metric has the label model_name."""

    def __init__(self, metrics: MetricRegistry, model_name: str) -> None:
        self._metrics = metrics
        self._labels = {"model_name": model_name}

    def collect(self) -> Iterator[Family]:
        for metric in self._metrics.collect():
            yield self._family(metric)

    def _family(self, metric: Metric) -> Family:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        names = list(self._labels) + ([name for name, _ in metric.samples[0][0]] if metric.samples else [])
        if metric.kind == "histogram":
            family = HistogramMetricFamily(metric.name, metric.help, labels=names)
        else:
            kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
            family = kind(metric.name, metric.help, labels=names)
        for labels, value in metric.samples:
            values = [*self._labels.values(), *(text for _, text in labels)]
            if isinstance(family, HistogramMetricFamily):
                assert isinstance(value, Histogram)
                counts = list(accumulate(value.counts))
                buckets = [(str(bound), float(count)) for bound, count in zip(value.bounds, counts, strict=False)]
                family.add_metric(values, [*buckets, ("+Inf", float(counts[-1]))], value.sum)
            else:
                assert not isinstance(value, Histogram)
                family.add_metric(values, value)
        return family

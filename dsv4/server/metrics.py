"""GET /metrics: the engine's metrics in Prometheus' text format, through prometheus_client (extra `server`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.responses import Response

from dsv4.engine.metrics import Histogram, Metric, MetricRegistry
from dsv4.server.errors import RequestError

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family


def metrics_router(metrics: Mapping[str, MetricRegistry]) -> APIRouter:
    """`metrics`: of each model, by its name."""
    router = APIRouter()

    @router.get("/metrics", include_in_schema=False)
    def prometheus() -> Response:  # pyright: ignore[reportUnusedFunction]
        """The metrics now. 501 where prometheus_client is not installed."""
        try:
            from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        except ImportError as error:
            missing = "metrics need prometheus_client: in the repository, .venv/bin/pip install '.[server]'"
            raise RequestError(501, missing) from error
        registry = CollectorRegistry(auto_describe=False)
        registry.register(MetricCollector(metrics))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


class MetricCollector:
    """A collector of prometheus_client. Every metric has the label model_name."""

    def __init__(self, metrics: Mapping[str, MetricRegistry]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Family]:
        families: dict[str, Family] = {}  # a metric stands once, with the values of every model
        for model_name, registry in self._metrics.items():
            for metric in registry.collect():
                if metric.name not in families or not families[metric.name].samples:
                    families[metric.name] = self._family(metric)
                self._add(families[metric.name], metric, model_name)
        yield from families.values()

    def _family(self, metric: Metric) -> Family:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        names = ["model_name"] + ([name for name, _ in metric.samples[0][0]] if metric.samples else [])
        if metric.kind == "histogram":
            family = HistogramMetricFamily(metric.name, metric.help, labels=names)
        else:
            kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
            family = kind(metric.name, metric.help, labels=names)
        return family

    def _add(self, family: Family, metric: Metric, model_name: str) -> None:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        for labels, value in metric.samples:
            values = [model_name, *(text for _, text in labels)]
            if isinstance(family, HistogramMetricFamily):
                assert isinstance(value, Histogram)
                counts = list(accumulate(value.counts))
                buckets = [(str(bound), float(count)) for bound, count in zip(value.bounds, counts, strict=False)]
                family.add_metric(values, [*buckets, ("+Inf", float(counts[-1]))], value.sum)
            else:
                assert isinstance(family, (GaugeMetricFamily, CounterMetricFamily)) and not isinstance(value, Histogram)
                family.add_metric(values, value)

"""Prometheus metrics: request counters, latency histograms, engine counters and gauges."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..generation.sequence import FINISHES
from .request_state import Record

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
P = "aquila_pd_"
SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LATELY = 0.1  # weight of the newest request in the mean that Retry-After rests on


class Metrics:
    """The metrics of one server in a registry of their own. service: where EngineCollector reads."""

    def __init__(self, service):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(service))
        made = {"registry": self.registry}
        self.requests = Counter(P + "requests", "HTTP requests by route and status", ["route", "status"], **made)
        self.seconds = Histogram(P + "request_seconds", "Whole requests", ["route"], buckets=SECONDS, **made)
        self.first_token = Histogram(P + "first_token_seconds", "Until the first token", buckets=SECONDS, **made)
        self.rejected = Counter(P + "rejected", "Requests refused because the queue was full", **made)
        self.early = Counter(P + "ended_early", "Generations ended by something else than their end", ["why"], **made)
        self._mean = 1.0

    def mean_seconds(self) -> float:
        """Moving average of the time a generation takes."""
        return self._mean

    def finished(self, record: Record) -> None:
        """A generation is over, however it ended."""
        self._mean += LATELY * (record.seconds() - self._mean)
        if record.first_token is not None:
            self.first_token.observe(record.first_token)
        if record.outcome:
            self.early.labels(record.outcome).inc()

    def answered(self, route: str, status: int, record: Record) -> None:
        """An HTTP request is over."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(record.seconds())

    def page(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector:
    """Collector of the engine's and the log's counters, read at scrape time."""

    def __init__(self, service):
        self._service = service

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats, worker, log = self._service.engine.stats, self._service.worker, self._service.log
        yield GaugeMetricFamily(P + "running_sequences", "Sequences in the batch", stats.running)
        yield GaugeMetricFamily(P + "waiting_sequences", "Sequences that wait for a slot", stats.waiting)
        yield GaugeMetricFamily(P + "healthy", "1 when /health says ok", int(worker.trouble() is None))
        counts = {
            "steps": (stats.steps, "Forward passes"),
            "prompt_tokens": (stats.prompt_tokens, "Prompt tokens computed"),
            "reused_tokens": (stats.reused_tokens, "Prompt tokens taken from an earlier request"),
            "new_tokens": (stats.new_tokens, "Tokens generated"),
            "nonfinite_logits": (stats.nonfinite, "Sequences ended by NaN or infinite logits"),
            "forward_seconds": (stats.forward_seconds, "Time in the model"),
            "step_seconds": (stats.step_seconds, "Time in the engine"),
            "engine_errors": (worker.errors, "Exceptions out of the engine"),
            "log_lines_lost": (log.lost, "Log lines that could not be written"),
        }
        for name, (value, words) in counts.items():
            yield CounterMetricFamily(P + name, words, value)
        ended = CounterMetricFamily(P + "finished_sequences", "Sequences by how they ended", labels=["reason"])
        for reason in FINISHES:
            ended.add_metric([reason], stats.finished.get(reason, 0))
        yield ended

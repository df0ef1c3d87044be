"""The metrics of a pod, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The pod's metrics, in their own registry: nothing is shared between pods of a process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.turns = Counter("gateway_turns", "Turns by how they ended", ["outcome"], registry=self.registry)
        self.turn_seconds = Histogram(
            "gateway_turn_seconds", "Answered turns, begin to commit", buckets=BUCKETS_S, registry=self.registry
        )
        self.graph_seconds = Histogram(
            "gateway_graph_seconds", "The graph's part of answered turns", buckets=BUCKETS_S, registry=self.registry
        )
        self.limited = Counter(
            "gateway_limited",
            "Calls refused by a limit; in shadow mode those that would have been",
            ["limit", "mode"],
            registry=self.registry,
        )
        self.running = Gauge("gateway_turns_running", "Turns running on this pod", registry=self.registry)
        self.foreign_replies = Gauge(
            "gateway_foreign_replies", "Redis replies that belonged to another call", registry=self.registry
        )
        self.outbox_records = Gauge("gateway_outbox_records", "Records not in Postgres yet", registry=self.registry)
        self.outbox_bytes = Gauge("gateway_outbox_bytes", "Bytes of the records not in Postgres yet", registry=self.registry)
        self.outbox_lag_seconds = Gauge(
            "gateway_outbox_lag_seconds", "Age in seconds of the oldest record not in Postgres yet", registry=self.registry
        )
        self.dead_letters = Gauge("gateway_dead_letters", "Records that Postgres refused", registry=self.registry)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

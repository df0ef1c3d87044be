"""The metrics of a pod, in Prometheus' text format."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest

from persistence.redis.epochs import Epoch

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
        self.partitions_unreachable = Gauge(
            "gateway_partitions_unreachable",
            "Partitions that did not answer and are missing in what is told of the outbox",
            registry=self.registry,
        )
        self._epochs: dict[int, Epoch] = {}
        self._redis_epoch = Gauge(
            "gateway_redis_epoch",
            "The highest epoch of a partition: how often its Redis may have forgotten",
            registry=self.registry,
        )
        self._lost = Gauge("gateway_turns_lost_at_most", "Turns that may be lost with a master", registry=self.registry)
        self._stored_behind = Gauge(
            "gateway_turns_stored_behind", "Turns stored behind others that had their place", registry=self.registry
        )
        self._erased_again = Gauge(
            "gateway_sessions_erased_again", "Erased sessions that had come back in Redis", registry=self.registry
        )
        self._not_compared = Gauge(
            "gateway_sessions_not_compared",
            "Sessions in use that Postgres has not been asked about yet",
            registry=self.registry,
        )

    def show_epochs(self, found: Iterable[Epoch]) -> None:
        """Shows what Redis knows of partitions' epochs; of a partition that is not among them what it knew last."""
        self._epochs |= {one.partition: one for one in found}
        known = self._epochs.values()
        self._redis_epoch.set(max((one.epoch for one in known), default=0))
        self._lost.set(sum(one.lost for one in known))
        self._stored_behind.set(sum(one.stored_behind for one in known))
        self._erased_again.set(sum(one.erased_again for one in known))
        self._not_compared.set(sum(one.vouched for one in known))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

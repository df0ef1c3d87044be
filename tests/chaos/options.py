"""What a run is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Topology = Literal["single", "sentinel", "cluster"]


@dataclass(frozen=True)
class Options:
    """Times in seconds. `faults` are names of `faults.FAULTS`, `together` is the share of them that comes two at once;
    `patience_s` is how long visitors go on asking after the last fault, `drain_s` how long the outbox may take then;
    `work_ms` are the times that answers take; `eviction` is Redis' policy; a full Redis may use `memory_share` of what it
    used before; pods and workers run in the tree `source`. A run ends early once a breach of a kind in `until` has shown.
    With `once` each fault is injected once, however long that takes.

    `replicas` is GATEWAY_REDIS_REPLICAS; with `min_replicas` a master without a replica in step refuses writes."""

    seconds: float = 60
    seed: int = 1
    topology: Topology = "single"
    faults: tuple[str, ...] = ()
    pods: int = 2
    workers: int = 2
    visitors: int = 24
    work_ms: tuple[int, ...] = (0, 0, 20, 100, 300)
    lease_s: float = 5
    appendfsync: str = "always"
    replicas: int = 0
    min_replicas: bool = False
    together: float = 0.2
    source: Path | None = None
    eviction: str = "volatile-lru"
    memory_share: float = 0.97
    until: frozenset[str] = frozenset()
    once: bool = False
    patience_s: float = 120
    drain_s: float = 90

    @property
    def loses_nothing(self) -> bool:
        """Whether not even an answer that only a lost master had may be lost."""
        return bool(self.replicas) or self.min_replicas

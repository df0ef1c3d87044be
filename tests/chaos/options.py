"""What a run is told."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Times in seconds. `faults` are names of `faults.FAULTS`, `together` is the share of them that comes two at once;
    `patience_s` is how long visitors go on asking after the last fault, `drain_s` how long the outbox may take then;
    `work_ms` are the times that answers take; `eviction` is Redis' policy; a full Redis may use `memory_share` of what it
    used before; pods and workers run in the tree `source`. A run ends early once a breach of a kind in `until` has shown.
    With `once` each fault is injected once, however long that takes."""

    seconds: float = 60
    seed: int = 1
    faults: tuple[str, ...] = ()
    pods: int = 2
    workers: int = 2
    visitors: int = 24
    work_ms: tuple[int, ...] = (0, 0, 20, 100, 300)
    lease_s: float = 5
    appendfsync: str = "always"
    together: float = 0.2
    source: Path | None = None
    eviction: str = "volatile-lru"
    memory_share: float = 0.97
    until: frozenset[str] = frozenset()
    once: bool = False
    patience_s: float = 120
    drain_s: float = 90

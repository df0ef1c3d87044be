"""Every Redis key: its name, type, lifetime and writer. The keys are a supported interface: operators read them.

key                                type    life                      written by
gw:{p}:session:<session_id>        hash    TTL only when all of it   lua/open, begin, commit, abort, cancel, renew, hydrate,
                                           is in Postgres and no     end, time_out, erase, mark_flushed, dead_letter,
                                           turn runs on it           retry_dead, reap, reconcile, doubt; its fields:
                                                                     model/fields.py
gw:{p}:outbox                      stream  permanent                 lua/open, begin, commit, end, time_out, erase,
                                                                     retry_dead: records on their way to Postgres
gw:{p}:outbox_bytes                string  permanent                 the same, mark_flushed, dead_letter: the size of the
                                                                     records on the outbox
gw:{p}:dead                        stream  permanent                 lua/dead_letter, retry_dead, erase: dead letters
gw:{p}:fence                       string  permanent                 lua/begin (one number per turn begun or ticket given),
                                                                     settle (never lower than Postgres knows)
gw:{p}:epoch                       hash    permanent                 lua/settle, reconcile; outbox.py, sweep.py: `epoch`, the
                                                                     replication id of the `server` that it began with,
                                                                     counters; see README
gw:{p}:awaited                     string  1 min                     scripts.py: written before each wait for replicas
gw:{p}:probe                       string  10 s                      lua/try_write: tried for readiness
gw:{p}:live                        zset    permanent, trimmed        lua/open, commit, hydrate; trimmed by lua/trim:
                                                                     sessions by their last activity, in ms
gw:{p}:running                     zset    permanent, trimmed        lua/begin, renew; entries leave with their turn:
                                                                     sessions by the end of their lease, in ms
gw:{p}:events:<turn_id>            stream  5 min after its last      lua/append, commit, abort, cancel: a turn log, its
                                                                     entries as in lua/lib/log_tail
gw:{p}:logs                        hash    permanent, trimmed        lua/append, commit, abort, cancel; lua/trim_logs: a
                                                                     field per session, `turn_id@expires_ms` of each of
                                                                     its turn logs, separated by spaces
gw:{p}:ticket:<session_id>         string  10 s                      lua/begin, read, follow, end, time_out, erase, open:
                                                                     guards lua/hydrate and lua/open
gw:limit:{p}:<bucket>              string  until it is empty         lua/limit; buckets: address:<ip>, sessions:<ip>,
                                                                     misses:<ip>, agent:<agent_id>,
                                                                     domain:<agent_id>:<domain>
gw:limit:{p}:day:<agent_id>        string  until midnight UTC        lua/limit: turns of the day
gw:limit:{p}:running:<agent_id>    hash    5 s after the last sync   lua/limit: a field per pod, turns@until_ms
gw:agent:<agent_id>                hash    permanent                 agent_copies.py
gw:agent:<name>                    hash    permanent                 agent_copies.py: points at the agent's id
gw:meta                            hash    permanent                 server_check.py: format and partitions

`p` is `crc16(session_id) % partitions`; all keys of one session share its hash slot. A limit's `p` is that of its name.
Published to, but no key: a channel per session, for wake-ups; a control channel, for cancelled turns."""

from binascii import crc_hqx

GROUP = "flush"
"""The consumer group of every outbox."""


class Keys:
    """Names of keys under one prefix and partition number."""

    def __init__(self, prefix: str, partitions: int) -> None:
        self.prefix = prefix
        self.partitions = partitions
        self.meta = f"{prefix}:meta"
        self.control = f"{prefix}:control"
        self._heads = [f"{prefix}:{{{partition}}}:" for partition in range(partitions)]

    def partition(self, session_id: str) -> int:
        """The partition of a session or limit: CRC16/XMODEM of its id, as in Redis Cluster, modulo `partitions`."""
        return crc_hqx(session_id.encode(), 0) % self.partitions

    def head(self, session_id: str) -> str:
        """The prefix of every key of this session."""
        return self._heads[self.partition(session_id)]

    def session(self, session_id: str) -> str:
        return f"{self.head(session_id)}session:{session_id}"

    def outbox(self, partition: int) -> str:
        return f"{self._heads[partition]}outbox"

    def outbox_bytes(self, partition: int) -> str:
        return f"{self._heads[partition]}outbox_bytes"

    def dead(self, partition: int) -> str:
        return f"{self._heads[partition]}dead"

    def live(self, partition: int) -> str:
        return f"{self._heads[partition]}live"

    def running(self, partition: int) -> str:
        return f"{self._heads[partition]}running"

    def logs(self, partition: int) -> str:
        return f"{self._heads[partition]}logs"

    def events(self, session_id: str, turn_id: str) -> str:
        """A turn log."""
        return f"{self.head(session_id)}events:{turn_id}"

    def channel(self, session_id: str) -> str:
        """The channel of a session's wake-ups."""
        return f"{self.head(session_id)}news:{session_id}"

    def agent(self, reference: str) -> str:
        """The hash of an agent's definition (by id) or of the pointer to it (by name)."""
        return f"{self.prefix}:agent:{reference}"

    def epoch(self, partition: int) -> str:
        return f"{self._heads[partition]}epoch"

    def fence(self, partition: int) -> str:
        return f"{self._heads[partition]}fence"

    def probe(self, partition: int) -> str:
        """The key, and the channel, that a pod's readiness is tried with."""
        return f"{self._heads[partition]}probe"

    def limit(self, bucket: str) -> str:
        """A limit of an address, an agent or a domain."""
        return f"{self.prefix}:limit:{{{self.partition(bucket)}}}:{bucket}"

    def permanent(self) -> set[str]:
        """The keys without a TTL, but for those of agents."""
        names = ("outbox", "outbox_bytes", "dead", "fence", "epoch", "live", "running", "logs")
        return {self.meta} | {head + name for head in self._heads for name in names}

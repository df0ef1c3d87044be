"""Every error that this package raises. A library's error becomes one of these once, at the edge where it occurs."""


class PersistenceError(Exception):
    """Root of this package's errors."""


class RedisUnavailable(PersistenceError):
    """Redis did not serve the call in time. Whether a write happened is unknown; repeating it is safe."""


class ForeignReply(RedisUnavailable):
    """A reply echoed another session or call. All connections were dropped, and nothing of the reply was used."""


class NotReplicated(RedisUnavailable):
    """Redis has it, and too few of its replicas have in time. Repeating the call is safe, and waits for them again."""


class CommandRefused(PersistenceError):
    """Redis refuses the command for good: its key has another type, or a script has a defect."""


class UnsuitableRedis(PersistenceError):
    """The Redis server's version, eviction policy, recorded format or partition number rules it out."""


class PostgresUnavailable(PersistenceError):
    """Postgres did not serve the call in time."""


class MigrationError(PersistenceError):
    """The migrations on disk and those applied to the database disagree."""


class Damaged(PersistenceError):
    """This version cannot read something stored. Never treated as absent.

    `where` names the key or row, `field` the part of it. The message quotes nothing of the value.
    """

    def __init__(self, where: str, field: str, detail: str) -> None:
        super().__init__(f"{where}: field {field}: {detail}")
        self.where = where
        self.field = field


class NewerFormat(Damaged):
    """Something stored has a format that only a later version reads, and is left as it is for that version."""


class DataRefused(PersistenceError):
    """Postgres, or its driver, refuses the data itself: repeating the call cannot help.

    `constraint` is the name of the violated constraint, if any. The message names the type of the error, never the data.
    """

    def __init__(self, detail: str, constraint: str = "") -> None:
        super().__init__(detail)
        self.constraint = constraint

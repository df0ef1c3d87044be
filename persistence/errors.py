"""Every error this package raises. Libraries' errors are translated into these once, at the edge where they occur."""


class PersistenceError(Exception):
    """The root of this package's errors."""


class RedisUnavailable(PersistenceError):
    """Redis could not serve the call in time; whether a write happened is unknown, and repeating it is safe."""


class ForeignReply(RedisUnavailable):
    """A reply echoed another session or call: the connection pool was dropped before any of it was used."""


class CommandRefused(PersistenceError):
    """Redis refuses a command for good: a key of another type, or a defect of a script."""


class UnsuitableRedis(PersistenceError):
    """The Redis server's version, eviction policy or recorded partition number rules it out."""


class PostgresUnavailable(PersistenceError):
    """Postgres could not serve the call in time."""


class MigrationError(PersistenceError):
    """The migrations on disk and those applied to the database do not agree."""


class Damaged(PersistenceError):
    """Something stored is not what this version can read. Never treated as absent.

    `where` names the key or row, `field` the part of it.
    """

    def __init__(self, where: str, field: str, detail: str) -> None:
        super().__init__(f"{where}: field {field}: {detail}")
        self.where = where
        self.field = field


class NewerFormat(Damaged):
    """Something stored has a format that only a later version reads. It is left as it is, for that version."""


class DataRefused(PersistenceError):
    """Postgres, or the driver before it, refuses the data itself: repeating the call cannot help.

    `constraint` names the rule that was broken, where there is one. The message tells the kind of error, never the data.
    """

    def __init__(self, detail: str, constraint: str = "") -> None:
        super().__init__(detail)
        self.constraint = constraint

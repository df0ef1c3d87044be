"""The fields of a session: the one list, a row a field.

The scripts' tables, the codec, the columns of the flush and the reading of rows all follow from it. A field that is added
gets a default: a hash, a record, a dead letter or a row that was written before the field existed is read with it. Without
a default, a field that is missing is damage. A record of the older version says nothing of the field, so Postgres has the
default until the newer version writes the session's next record.

Beside these fields a hash has its hot turns, `t:<n>`, and `dead` if the session has dead letters.

To add a field: a row here, a member of `Session` with the same default, and a migration that adds the column to
`agent_sessions` and, under the field's name, to the view `session_headers`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from persistence.model.ids import as_uuid
from persistence.model.kinds import FLAG, MOMENT, OBJECT, TEXT, UUID, WHOLE, Kind, choice, optional
from persistence.model.session import Session

FORMAT = 1
"""Version of the key and value formats, recorded in `gw:meta`, each session hash and each outbox record."""

RECORD_FORMAT = 2
"""The newest format of records that this version reads and writes; that of everything else is FORMAT."""


class Column(msgspec.Struct, frozen=True):
    """A column of `agent_sessions`, and what it gets of the field's value: by the field's kind, or `pick` of it.

    `changes` tells whether a later revision may replace it, `final` when none may any more, in whatever order they come: an
    SQL condition on a row `{0}`. `null` is the stored text that is NULL in the column, None when
    NULL means that nothing was ever written.
    """

    name: str
    type: str
    changes: bool = False
    null: str | None = None
    pick: Callable[[Any], Any] | None = None
    final: str = ""


ENDED = "({0}.status = 'ended')"
BOUND = "({0}.user_id IS NOT NULL OR {0}.external_user_id IS NOT NULL)"


class Field(msgspec.Struct, frozen=True):
    """A field of the session hash, and what it says of the session.

    `default` is its stored text where it is missing, None when that is damage. `initial` is its stored text in a new session
    unless the script that creates it has another; without it, the default.
    """

    name: str
    kind: Kind
    meaning: str
    columns: tuple[Column, ...] = ()
    default: str | None = None
    initial: str | None = None

    @property
    def null(self) -> str | None:
        """The stored text that a NULL in the field's row stands for; None: damage."""
        column = self.columns[0] if self.columns else None
        return self.default if column is None or column.null is None else column.null


class SessionFields:
    """A list of fields and what follows from it. `header` describes the session, and is what `struct` has and what goes to
    Postgres; `state` is in the hash alone: where its turns are and what holds it.

    Raises TypeError when the list and the struct differ.
    """

    def __init__(self, header: Sequence[Field], state: Sequence[Field], struct: type[Session]) -> None:
        self.header = tuple(header)
        self.state = tuple(state)
        self.struct = struct
        self.decoder = msgspec.json.Decoder(struct)
        self.names = ("format", *(field.name for field in header))
        """What the scripts reply of a session, in this order."""
        self.readers = tuple((field.name, field.kind.read) for field in header)
        self.stored = tuple(
            (name.encode(), None if default is None else default.encode())
            for name, default in (("format", None), *((field.name, field.default) for field in header))
        )
        """The same names with their defaults, as bytes."""
        self.state_readers = {
            field.name: (field.name.encode(), None if field.default is None else field.default.encode(), field.kind.read)
            for field in state
        }
        self.columns = tuple((column, field) for field in header for column in field.columns)
        _check(self.header, struct)

    def __iter__(self) -> Iterator[Field]:
        return iter((*self.header, *self.state))

    def texts(self, session: Session) -> dict[str, str]:
        """The session's fields as a hash stores them."""
        return {field.name: field.kind.write(getattr(session, field.name)) for field in self.header}


def _check(header: Sequence[Field], struct: type[Session]) -> None:
    members = {member.name: member for member in msgspec.structs.fields(struct)}
    names = [field.name for field in header]
    if names != list(members):
        raise TypeError(f"the fields {names} are not those of {struct.__name__}: {list(members)}")
    for field in header:
        member = members[field.name]
        if (field.default is None) is not member.required:
            raise TypeError(f"{field.name} has a default in one of its list and {struct.__name__} only")
        if field.default is None:
            continue
        made = member.default if member.default is not msgspec.NODEFAULT else member.default_factory()
        if made != field.kind.read(field.default):
            raise TypeError(f"the default of {field.name} is another one in {struct.__name__}")


def _user_uuid(user_id: str) -> str | None:
    # Only the canonical form comes back as it was: 32 hex digits are somebody else's kind of id.
    return user_id if as_uuid(user_id) == user_id else None


def _external_user(user_id: str) -> str | None:
    return None if as_uuid(user_id) == user_id else user_id or None


HEADER = (
    Field("id", UUID, "its UUID, and the key of its row in Postgres", (Column("id", "uuid"),)),
    Field("session_id", TEXT, "the id that its visitor knows", (Column("session_id", "text"),)),
    Field(
        "agent_id", optional(UUID), "its agent; empty in a damaged session that was erased", (Column("agent_id", "uuid"),)
    ),
    Field(
        "channel",
        choice("text", "voice", "phone", ""),
        "how its visitor talks; empty in a damaged session that was erased",
        (Column("channel", "text"),),
    ),
    Field(
        "status",
        choice("active", "ended", "timeout", "erased"),
        "erased: until Postgres has erased it too",
        (Column("status", "text", changes=True, final=ENDED),),
        initial="active",
    ),
    Field(
        "user_id",
        TEXT,
        "the verified user whose session it is; empty: anonymous",
        (
            Column("user_id", "uuid", changes=True, pick=_user_uuid, final=BOUND),
            Column("external_user_id", "text", changes=True, pick=_external_user, final=BOUND),
        ),
    ),
    Field("website_domain", TEXT, "the website it is bound to", (Column("website_domain", "text", null=""),)),
    Field("ip_address", TEXT, "its visitor's address", (Column("ip_address", "text", null=""),)),
    Field("user_agent", TEXT, "its visitor's browser", (Column("user_agent", "text", null=""),)),
    Field("started_at", MOMENT, "when it was created", (Column("started_at", "timestamptz"),)),
    Field(
        "last_activity_at",
        MOMENT,
        "when its last turn's last message was created",
        (Column("last_activity_at", "timestamptz", changes=True),),
    ),
    Field(
        "ended_at",
        optional(MOMENT),
        "when it ended or timed out; empty until then",
        (Column("ended_at", "timestamptz", changes=True, null="", final=ENDED),),
        initial="",
    ),
    # Postgres counts the messages that it has: flush.sql.
    Field("message_count", WHOLE, "messages so far", initial="0"),
    Field("context", OBJECT, "what its graph stores", (Column("context_data", "jsonb", changes=True),), initial="{}"),
    Field("metadata", OBJECT, "what its first request said about it", (Column("metadata", "jsonb"),)),
    Field("minted", FLAG, "1: the gateway made the session id, and its token is needed", (Column("minted", "bool"),)),
    Field("turns", WHOLE, "the number of the last turn", (Column("turns", "int", changes=True),), initial="0"),
    Field(
        "revision",
        WHOLE,
        "the number of the last record about it: the newest record wins",
        (Column("revision", "bigint", changes=True),),
        initial="0",
    ),
)

STATE = (
    Field("first_hot", WHOLE, "the number of the oldest turn in Redis", initial="1"),
    Field("flushed", WHOLE, "the number of the last turn up to which Postgres has all", initial="0"),
    Field("unflushed", TEXT, "the records that Postgres lacks, as `fact@entry`, separated by spaces", initial=""),
    Field("hot_ttl_s", WHOLE, "how long it stays in Redis when idle"),
    Field("turn", TEXT, "the id of the running turn; empty when idle, like the next three", initial=""),
    Field("turn_fence", TEXT, "the running turn's fence", initial=""),
    Field("turn_lease_until", TEXT, "the end of the running turn's lease", initial=""),
    Field("lease_ms", WHOLE, "how long the lease of its last turn was given for", default="0"),
    Field("turn_message_id", TEXT, "the running turn's message_id and digest, separated by a space", initial=""),
    Field("waiting", TEXT, "the waiting turns in their order, as `turn_id@dropped_at_ms`, separated by spaces", initial=""),
    Field("rate_tat_ms", TEXT, "up to when its rate limit is charged", initial=""),
    Field("epoch", WHOLE, "the epoch in which it was last known to be what Postgres knows of it, or newer", default="0"),
)

SESSION_FIELDS = SessionFields(HEADER, STATE, Session)

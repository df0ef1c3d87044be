"""Timestamps: ISO-8601 UTC text with milliseconds, as operators read them."""

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def iso(ms: int) -> str:
    """Milliseconds since 1970 as stored text."""
    # Whole numbers all the way: as seconds with a fraction some moments would lose a millisecond.
    return iso_from(_EPOCH + timedelta(milliseconds=ms))


def iso_from(moment: datetime) -> str:
    """A moment with a time zone as stored text."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def moment(text: str) -> datetime:
    """Stored text as a moment. Raises ValueError."""
    if not text.endswith("Z"):
        raise ValueError("not a time in UTC")
    return datetime.fromisoformat(text)


def ms_of(text: str) -> int:
    """Stored text as milliseconds since 1970. Raises ValueError."""
    return round(moment(text).timestamp() * 1000)

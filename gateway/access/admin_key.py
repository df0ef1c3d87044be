"""The admin key: how it is compared, over which connections it is accepted, how often it may be guessed.

What always holds: a key is compared only for requests over TLS or from this machine, and only while their address has not
failed too often. So a guesser learns nothing from a refusal.
"""

from collections.abc import Callable, Mapping
from hashlib import sha256
from hmac import compare_digest
from ipaddress import IPv6Address, ip_address
from time import monotonic

from gateway.access.audit import refused
from gateway.limits.buckets import network
from gateway.problems import RateLimited, TlsRequired

FAILURES = 10
"""Wrong keys that one address may send in `PER_S` seconds; after these no key of it is compared until they are over."""
PER_S = 60.0
MAX_ADDRESSES = 10_000
FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
"""Headers that proxies add. Behind a proxy that is not trusted, every client seems to be on this machine."""


class AdminKeys:
    """The admin key and, during a rotation, the one before it. Compared as digests: the time tells nothing of a key, not
    even its length."""

    def __init__(self, current: str, previous: str = "") -> None:
        given = {"current": current, "previous": previous}
        self._digests = {name: _digest(key) for name, key in given.items() if key}

    def which(self, credentials: str) -> str:
        """The key that the credentials are: `current`, `previous`, or '' for neither."""
        digest, found = _digest(credentials), ""
        for name, known in self._digests.items():
            # No early return: the time is the same for each key and for none.
            if compare_digest(digest, known) and credentials:
                found = found or name
        return found


def _digest(text: str) -> bytes:
    return sha256(text.encode(errors="surrogateescape")).digest()


class FailedAttempts:
    """Failed attempts per client address on this pod, in fixed windows of `PER_S` seconds. `clock` is in seconds.

    An address beyond the limit is locked out with the right key too: the answer would tell that it is right. Attempts during
    the lock-out do not prolong it.
    """

    def __init__(self, *, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        # Window end and failures by client, the window that ends first at the front.
        self._windows: dict[str, tuple[float, int]] = {}

    @property
    def clients(self) -> int:
        """Clients with a window."""
        return len(self._windows)

    def wait_s(self, address: str) -> float:
        """Seconds until keys from this address are compared again; 0 when they are."""
        ends_at, failures = self._windows.get(network(address), (0.0, 0))
        left_s = ends_at - self._clock()
        return left_s if left_s > 0 and failures >= FAILURES else 0.0

    def count(self, address: str) -> None:
        """Counts a failed attempt."""
        now, client = self._clock(), network(address)
        ends_at, failures = self._windows.get(client, (0.0, 0))
        if ends_at <= now:
            self._windows.pop(client, None)
            self._evict(now)
            ends_at, failures = now + PER_S, 0
        self._windows[client] = (ends_at, failures + 1)

    def _evict(self, now: float) -> None:
        """Drops windows that are over, and the oldest one when there are too many."""
        while self._windows:
            client = next(iter(self._windows))
            if self._windows[client][0] > now and len(self._windows) < MAX_ADDRESSES:
                break
            del self._windows[client]


class AdminAccess:
    """Accepts or refuses attempts to use an admin key. `plaintext` accepts them without TLS."""

    def __init__(self, keys: AdminKeys, *, plaintext: bool, attempts: FailedAttempts | None = None) -> None:
        self._keys = keys
        self._plaintext = plaintext
        self._attempts = attempts or FailedAttempts()
        # Limits the log lines: a flood of calls must not become a flood of lines.
        self._logged = FailedAttempts()

    def try_key(self, credentials: str, address: str, scheme: str, headers: Mapping[str, str], request_id: str) -> str:
        """The key that the credentials are (`AdminKeys.which`). Raises TlsRequired or RateLimited before any comparison."""
        if not (self._plaintext or scheme == "https" or is_local(address, headers)):
            if not self._logged.wait_s(address):
                self._logged.count(address)
                refused("no_tls", address, request_id)
            raise TlsRequired
        wait_s = self._attempts.wait_s(address)
        if wait_s:
            raise RateLimited("too many wrong admin keys from this address", retry_after_s=wait_s)
        which = self._keys.which(credentials)
        if not which:
            self._attempts.count(address)
            refused("wrong_key", address, request_id, shut_out_s=round(self._attempts.wait_s(address)))
        return which


def is_local(address: str, headers: Mapping[str, str]) -> bool:
    """Whether a request comes from a program on this machine other than a proxy."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return parsed.is_loopback and not any(name in headers for name in FORWARDED)

"""The admin key: who has it, over which connections it is taken, how often it may be guessed.

What always holds: a key is compared only when the request came over TLS or from this machine, and when its address has not
just failed too often; so a refusal that tells nothing of the key is all that a guesser gets.
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
"""Wrong keys from one address in `PER_S` seconds; then no key from there is compared until those are over."""
PER_S = 60.0
REMEMBERED = 10_000
FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
"""What a proxy adds. Behind one that is not trusted every client seems to be on this machine."""


class AdminKeys:
    """The admin key, and the one before it while keys are changed. Compared as digests: in constant time, and nothing is
    told of how long they are."""

    def __init__(self, current: str, previous: str = "") -> None:
        given = {"current": current, "previous": previous}
        self._digests = {name: _digest(key) for name, key in given.items() if key}

    def which(self, credentials: str) -> str:
        """`current` or `previous`; empty for what is neither."""
        digest, found = _digest(credentials), ""
        for name, known in self._digests.items():
            # All are compared: the time is the same for each key and for none.
            if compare_digest(digest, known) and credentials:
                found = found or name
        return found


def _digest(text: str) -> bytes:
    return sha256(text.encode(errors="surrogateescape")).digest()


class FailedAttempts:
    """Counts wrong keys per client address, on this pod, for a bounded number of addresses. `clock` is in seconds.

    An address that has failed too often is shut out, with the right key too, or the answer would tell that it is right;
    until its minute is over, and what it tries meanwhile does not prolong that.
    """

    def __init__(self, *, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        # In the order in which their minutes end.
        self._windows: dict[str, tuple[float, int]] = {}

    def wait_s(self, address: str) -> float:
        """How long no key from this address is compared; 0 when one is."""
        ends_at, failures = self._windows.get(network(address), (0.0, 0))
        left_s = ends_at - self._clock()
        return left_s if left_s > 0 and failures >= FAILURES else 0.0

    def count(self, address: str) -> None:
        """Notes a wrong key."""
        now, client = self._clock(), network(address)
        ends_at, failures = self._windows.get(client, (0.0, 0))
        if ends_at <= now:
            self._windows.pop(client, None)
            self._make_room(now)
            ends_at, failures = now + PER_S, 0
        self._windows[client] = (ends_at, failures + 1)

    def _make_room(self, now: float) -> None:
        while self._windows:
            client = next(iter(self._windows))
            if self._windows[client][0] > now and len(self._windows) < REMEMBERED:
                break
            del self._windows[client]


class AdminDoor:
    """Decides about one attempt to use an admin key."""

    def __init__(self, keys: AdminKeys, *, plaintext: bool, attempts: FailedAttempts | None = None) -> None:
        self._keys = keys
        self._plaintext = plaintext
        self._attempts = attempts or FailedAttempts()
        # So that a flood of them is no flood of lines.
        self._told = FailedAttempts()

    def try_key(self, credentials: str, address: str, scheme: str, headers: Mapping[str, str], request_id: str) -> str:
        """Which key it is, or empty for none. Raises TlsRequired or RateLimited without having compared it."""
        if not (self._plaintext or scheme == "https" or is_local(address, headers)):
            if not self._told.wait_s(address):
                self._told.count(address)
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
    """Whether a request comes from a program on this machine, and not through a proxy on it."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return parsed.is_loopback and not any(name in headers for name in FORWARDED)

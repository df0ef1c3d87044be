"""Website domains: what a request's Origin says, and what an agent's `allowed_domains` say of it.

A browser names a website in one way: scheme, host in lower case and punycode, port unless it is the scheme's own (WHATWG
HTML, "serialization of an origin"). Everything else that claims to be an Origin is no website: its domain is `null`, which
no entry of a list matches.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address

import idna
import msgspec

NOWHERE = "null"
MAX_DOMAIN = 255
"""Of its column."""

_ORIGIN = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?", re.IGNORECASE | re.ASCII)
_LABEL = re.compile(r"[a-z0-9_-]{1,63}", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)


class Origin(msgspec.Struct, frozen=True):
    """Where a page is from. Its port is 0 when it is from nowhere."""

    domain: str
    port: int = 0


@lru_cache(maxsize=4096)
def read_origin(text: str) -> Origin:
    """What an Origin header says. A page without an origin of its own (`null`) and what is no origin are from nowhere."""
    found = _ORIGIN.fullmatch(text) if len(text) <= 300 else None
    if found is None:
        return Origin(NOWHERE)
    scheme, host, port = found.groups()
    try:
        number = int(port) if port else 443 if scheme.lower() == "https" else 80
        return Origin(_host(host), number) if 0 < number < 65_536 else Origin(NOWHERE)
    except ValueError:
        return Origin(NOWHERE)


def normal_domain(text: str) -> str:
    """A host name that somebody wrote, as it is stored and compared: lower case, punycode, no trailing dot, bounded."""
    domain = text.strip().lower().rstrip(".")[:MAX_DOMAIN]
    if domain.isascii():
        return domain
    try:
        return idna.encode(domain, uts46=True).decode()
    except UnicodeError:
        return domain


class AllowedDomains:
    """The entries of an agent's `allowed_domains`, ready to be compared: made once per definition. None allows any.

    An entry is an exact host or `*.example.com` (all below it, itself not), perhaps with a port; without one it is any port.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self.entries = entries
        self.any = not entries
        self._exact: set[tuple[str, int]] = set()
        self._below: set[tuple[str, int]] = set()
        for entry in entries:
            try:
                below, host, port = _read_entry(entry)
            except ValueError:
                # Stored before entries were checked: it never matched anything, and does not now.
                continue
            (self._below if below else self._exact).add((host, port))

    def allow(self, origin: Origin) -> bool:
        """Whether pages from there may use the agent."""
        if self.any:
            return True
        if origin.domain == NOWHERE:
            return False
        ports = (0, origin.port)
        host = origin.domain
        if any((host, port) in self._exact for port in ports):
            return True
        dot = host.find(".") if self._below else -1
        while dot != -1:
            if any((host[dot + 1 :], port) in self._below for port in ports):
                return True
            dot = host.find(".", dot + 1)
        return False


def check_allowed_domains(entries: Sequence[str]) -> None:
    """Raises ValueError, which says why, for an entry that no website can ever match."""
    for entry in entries:
        try:
            _read_entry(entry)
        except ValueError as error:
            raise ValueError(f"{entry!r} {error}") from error


def _read_entry(entry: str) -> tuple[bool, str, int]:
    """An entry as (whether it is about what is below the host, host, port or 0). Raises ValueError."""
    text = entry.strip()
    if "://" in text:
        raise ValueError("has a scheme: write the host alone")
    if found := re.search(r"[/?#@\\\s]", text):
        raise ValueError(f"contains {found[0]!r}: write the host alone")
    if text == "*":
        raise ValueError("is no host: an empty list allows any website")
    below, text = text.startswith("*."), text.removeprefix("*.")
    if "*" in text:
        raise ValueError("has a * that is not the whole first label, as in *.example.com")
    port = 0
    if text.endswith("]") or (text.count(":") > 1 and not text.startswith("[")):
        host = text if text.startswith("[") else f"[{text}]"
    else:
        host, colon, digits = text.rpartition(":")
        host = host if colon else text
        if colon:
            if not (digits.isascii() and digits.isdigit() and len(digits) <= 5 and 0 < int(digits) < 65_536):
                raise ValueError("has no port behind its colon")
            port = int(digits)
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode()
        except UnicodeError as error:
            raise ValueError(f"is no host name ({error}); perhaps in punycode") from error
    host = _host(host)
    if host == NOWHERE:
        raise ValueError("is what pages without a website are from, which no list can allow")
    if below and (":" in host or _NUMBER.fullmatch(host.rpartition(".")[2])):
        raise ValueError("has nothing below it: an address is no domain")
    return below, host, port


def _host(text: str) -> str:
    """A host as browsers name it, an IPv6 address without its brackets. Raises ValueError."""
    if text.startswith("["):
        try:
            return str(IPv6Address(text[1:-1]))
        except AddressValueError as error:
            raise ValueError("is no IPv6 address") from error
    host = text.lower().removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("is no host name")
    if _NUMBER.fullmatch(labels[-1]):
        # To a browser such a host is an IPv4 address, and it writes that as four numbers (WHATWG URL, section 3.5).
        try:
            return str(IPv4Address(host))
        except AddressValueError as error:
            raise ValueError("is no IPv4 address") from error
    return host

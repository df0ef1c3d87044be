"""The admin key: compared without telling anything, guessed a few times a minute at most, taken over safe ways only."""

import hmac
import logging
from collections.abc import Iterator
from contextlib import suppress

import pytest
import structlog
from structlog.testing import capture_logs

from gateway.access.admin_key import FAILURES, PER_S, AdminAccess, AdminKeys, FailedAttempts, is_local
from gateway.access.audit import Operator, audited, changed, refused
from gateway.access.caller import kept_address
from gateway.limits.buckets import network
from gateway.problems import RateLimited, SessionNotFound, TlsRequired
from persistence.model.agents import AgentDefinition

KEY, PREVIOUS = "the admin key of now", "the key before it"
HERE, ELSEWHERE = "127.0.0.1", "203.0.113.7"


class Clock:
    """A clock that goes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def door(clock: Clock) -> Iterator[AdminAccess]:
    """A door whose attempts go by the test's clock; its log lines go nowhere."""
    with capture_logs():
        yield AdminAccess(AdminKeys(KEY, PREVIOUS), plaintext=False, attempts=FailedAttempts(clock=clock))


def knock(door: AdminAccess, credentials: str, address: str = HERE, scheme: str = "http", **headers: str) -> str:
    """Tries a key."""
    return door.try_key(credentials, address, scheme, {name.replace("_", "-"): headers[name] for name in headers}, "id")


@pytest.mark.parametrize(
    ("credentials", "which"),
    [
        (KEY, "current"),
        (PREVIOUS, "previous"),
        (KEY[:-1], ""),
        (KEY + "s", ""),
        (KEY.upper(), ""),
        ("", ""),
        ("\u00e4\u00ff", ""),
        ("\udcff", ""),
    ],
)
def test_only_the_admin_key_and_the_one_before_it_are_admin_keys(credentials: str, which: str) -> None:
    assert AdminKeys(KEY, PREVIOUS).which(credentials) == which


def test_without_an_admin_key_nobody_is_admin() -> None:
    assert [AdminKeys("").which(given) for given in ("", "x", KEY)] == ["", "", ""]
    assert AdminKeys(KEY).which("") == ""
    assert AdminKeys(KEY).which(PREVIOUS) == ""


def test_what_is_compared_is_of_one_length_whatever_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare_digest` takes the time of the shorter one: of the key itself it would tell the length."""
    compared: list[tuple[int, int]] = []
    really = hmac.compare_digest

    def noting(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return really(one, other)

    monkeypatch.setattr("gateway.access.admin_key.compare_digest", noting)
    keys = AdminKeys(KEY, PREVIOUS)
    for given in ("", "x", KEY, PREVIOUS, "x" * 10_000):
        keys.which(given)
    assert compared == [(32, 32)] * 10, "both keys each time, also after the first has matched"


def test_after_some_wrong_keys_even_the_right_one_is_not_compared_for_a_minute(door: AdminAccess, clock: Clock) -> None:
    for _ in range(FAILURES):
        assert knock(door, "wrong") == ""
    for given in ("wrong", KEY):
        with pytest.raises(RateLimited) as refusal:
            knock(door, given)
        assert refusal.value.retry_after_s == PER_S
    clock.now += PER_S
    assert knock(door, KEY) == "current"


def test_what_is_tried_meanwhile_does_not_prolong_it(door: AdminAccess, clock: Clock) -> None:
    for _ in range(FAILURES):
        knock(door, "wrong")
    for _ in range(100):
        clock.now += PER_S / 101
        with pytest.raises(RateLimited):
            knock(door, "wrong")
    clock.now += PER_S / 100
    assert knock(door, KEY) == "current"


def test_right_keys_are_never_counted_and_wrong_ones_are_forgotten(door: AdminAccess, clock: Clock) -> None:
    for _ in range(5):
        for _ in range(FAILURES - 1):
            assert knock(door, "wrong") == ""
        assert knock(door, KEY) == "current"
        clock.now += PER_S


def test_one_address_does_not_shut_out_another(door: AdminAccess) -> None:
    for _ in range(FAILURES):
        knock(door, "wrong", ELSEWHERE, "https")
    with pytest.raises(RateLimited):
        knock(door, KEY, ELSEWHERE, "https")
    assert knock(door, KEY, "203.0.113.8", "https") == "current"


def test_all_addresses_of_one_ipv6_customer_are_one(door: AdminAccess) -> None:
    for number in range(FAILURES):
        knock(door, "wrong", f"2001:db8:1:2::{number}", "https")
    with pytest.raises(RateLimited):
        knock(door, KEY, "2001:db8:1:2:ffff::1", "https")
    assert knock(door, KEY, "2001:db8:1:3::1", "https") == "current"
    assert network("::ffff:203.0.113.7") != network("::ffff:203.0.113.8")


def test_what_is_remembered_of_addresses_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.access.admin_key.MAX_ADDRESSES", 50)
    attempts = FailedAttempts(clock=clock)
    for number in range(500):
        attempts.count(f"198.51.100.{number}")
    assert attempts.clients == 50
    clock.now += PER_S
    attempts.count(ELSEWHERE)
    assert attempts.clients == 1, "what is over is forgotten"


@pytest.mark.parametrize(
    ("address", "scheme", "headers", "taken"),
    [
        (HERE, "http", {}, True),
        ("::1", "http", {}, True),
        ("::ffff:127.0.0.1", "http", {}, True),
        ("127.8.9.1", "http", {}, True),
        (ELSEWHERE, "https", {}, True),
        (ELSEWHERE, "http", {}, False),
        ("10.0.0.5", "http", {}, False),
        ("", "http", {}, False),
        ("localhost", "http", {}, False),
        (HERE, "http", {"x_forwarded_for": ELSEWHERE}, False),
        (HERE, "http", {"x_forwarded_for": HERE}, False),
        (HERE, "http", {"x_forwarded_proto": "https"}, False),
        (HERE, "http", {"forwarded": f"for={ELSEWHERE};proto=https"}, False),
        (HERE, "http", {"via": "1.1 proxy"}, False),
        (HERE, "http", {"x_real_ip": HERE}, False),
        (HERE, "https", {"x_forwarded_for": ELSEWHERE}, True),
    ],
)
def test_a_key_is_taken_over_tls_or_from_this_machine(
    door: AdminAccess, address: str, scheme: str, headers: dict[str, str], taken: bool
) -> None:
    if taken:
        assert knock(door, KEY, address, scheme, **headers) == "current"
        return
    with pytest.raises(TlsRequired):
        knock(door, KEY, address, scheme, **headers)


def test_where_it_is_configured_so_a_key_is_taken_in_plain() -> None:
    assert knock(AdminAccess(AdminKeys(KEY), plaintext=True), KEY, ELSEWHERE) == "current"
    assert not is_local(ELSEWHERE, {})


def test_a_refusal_is_logged_with_its_address_and_without_the_key(clock: Clock) -> None:
    door = AdminAccess(AdminKeys(KEY), plaintext=False, attempts=FailedAttempts(clock=clock))
    with capture_logs() as logs:
        for _ in range(3 * FAILURES):
            with suppress(RateLimited):
                knock(door, "a wrong key", ELSEWHERE, "https")
    line = {"event": "admin.refused", "log_level": "warning", "address": ELSEWHERE, "request_id": "id"}
    wrong = line | {"reason": "wrong_key"}
    assert logs == [wrong] * (FAILURES - 1) + [wrong | {"shut_out_s": 60}], "a flood of keys is no flood of lines"
    with capture_logs() as logs:
        for _ in range(3 * FAILURES):
            with suppress(TlsRequired):
                knock(door, KEY, ELSEWHERE, "http")
    assert logs == [line | {"reason": "no_tls"}] * FAILURES


def test_an_audit_line_tells_how_it_ended() -> None:
    operator = Operator(ELSEWHERE, "a request", "previous")
    with capture_logs() as logs:
        with audited("session_shown", operator, session="gs_…") as facts:
            facts["id"] = "a uuid"
        with pytest.raises(SessionNotFound), audited("session_shown", operator):
            raise SessionNotFound
        with pytest.raises(ZeroDivisionError), audited("session_shown", operator):
            raise ZeroDivisionError
    who = {"address": ELSEWHERE, "request_id": "a request", "key": "previous"}
    line = {"event": "audit.session_shown", "log_level": "info", **who}
    assert logs == [
        line | {"outcome": "done", "session": "gs_…", "id": "a uuid"},
        line | {"outcome": "session_not_found"},
        line | {"outcome": "ZeroDivisionError"},
    ]


def test_the_trail_is_written_whatever_the_log_level_is() -> None:
    known = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        with capture_logs() as logs:
            structlog.get_logger().error("something.else")
            with audited("session_shown", Operator(ELSEWHERE, "a request", "current")):
                pass
            refused("wrong_key", ELSEWHERE, "a request")
    finally:
        structlog.configure(**known)
    assert [line["event"] for line in logs] == ["audit.session_shown", "admin.refused"]


def test_a_visitor_leaves_no_audit_line() -> None:
    with capture_logs() as logs, audited("session_shown", None):
        pass
    assert logs == []


def test_of_a_definition_the_names_of_what_changed_are_told() -> None:
    old = AgentDefinition(graph="echo", config={"key": "one"})
    assert changed(old, old) == []
    assert changed(old, AgentDefinition(graph="chat", config={"key": "two"})) == ["graph", "config"]
    assert changed(None, old) == ["graph", "config"]
    assert changed(old, AgentDefinition(graph="echo", retention_days=30)) == ["config", "retention_days"]


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("203.0.113.7", "203.0.113.0"),
        ("203.0.113.255", "203.0.113.0"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::"),
        ("2001:db8::1", "2001:db8::"),
        ("::ffff:203.0.113.7", "203.0.113.0"),
        ("fe80::1%eth0", "fe80::"),
        ("unknown", ""),
        ("", ""),
    ],
)
def test_a_truncated_address_names_a_network_and_nobody_in_it(address: str, kept: str) -> None:
    assert kept_address(address, truncate=True) == kept
    assert kept_address(address, truncate=False) == address

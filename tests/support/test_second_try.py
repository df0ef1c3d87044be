"""What fails once is tried again alone; what hangs takes no other test with it. Both on small suites of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.hangs import GRACE_S
from tests.support.serving import ROOT

FLAKY = """
from pathlib import Path
import os
import pytest

FIRST_TIME = Path(__file__).with_name("been_here")

def fails_once(name):
    file = Path(__file__).with_name(name)
    if not file.exists():
        file.touch()
        raise AssertionError(f"not the first time\\nof {name}")

def test_that_passes():
    pass

@pytest.mark.parametrize("text", ["a [b] c::d", "e"])
def test_that_is_flaky(text):
    if text != "e":
        fails_once("call")

@pytest.fixture
def shaky():
    fails_once("setup")

def test_whose_fixture_is_flaky(shaky):
    pass
"""
DYING = """
from test_flaky import fails_once
import os
from pathlib import Path

def test_that_takes_its_process_along():
    file = Path(__file__).with_name("died")
    if not file.exists():
        file.touch()
        os._exit(3)
"""
BROKEN = """
from test_flaky import fails_once

def test_that_fails():
    assert 1 == 2, "never right"
"""
SKIPPED_THEN = """
from pathlib import Path
import pytest

def test_that_is_skipped_the_second_time():
    file = Path(__file__).with_name("skipped")
    if file.exists():
        pytest.skip("nothing to try")
    file.touch()
    raise AssertionError("the first time")
"""
HANGING = """
import time

def test_that_hangs():
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass

def test_behind_it():
    pass
"""
GUARDED = """
from tests.support.hangs import HangGuard

def pytest_configure(config):
    config.pluginmanager.register(HangGuard(grace_s=0.5))
"""


def run(folder: Path, *command: str, **files: str) -> tuple[int, str]:
    """A suite of these files, run in a folder of its own; the exit status and what was printed."""
    # Without the plugins that these suites do not need pytest starts in a fraction of the time.
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p xdist.plugin -p pytest_timeout\n")
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SECOND_TRY_"))}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        check=False,
        cwd=folder,
        # A folder for temporary files of its own: pytest takes the rights of the shared one from everybody else, and the
        # PostgreSQL of the tests beside this may run as another user.
        env={
            **environment,
            "PYTHONPATH": str(ROOT),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_DEBUG_TEMPROOT": str(folder),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout


def second_try(folder: Path, *options: str, **files: str) -> tuple[int, list[str], list[str]]:
    """The exit status, the lines of the notes, and the lines that were printed."""
    status, output = run(folder, "tests.support.second_try", str(folder / "notes"), *options, **files)
    return status, (folder / "notes").read_text().splitlines(), output.splitlines()


def test_what_passes_alone_is_flaky_and_the_run_is_green(tmp_path: Path) -> None:
    status, notes, lines = second_try(tmp_path, "-n", "2", test_flaky=FLAKY, test_dying=DYING)
    assert status == 0, lines
    assert sorted(line.rpartition(": ")[0] for line in notes) == [
        "flaky: test_dying.py::test_that_takes_its_process_along",
        "flaky: test_flaky.py::test_that_is_flaky[a [b] c::d]: AssertionError",
        "flaky: test_flaky.py::test_whose_fixture_is_flaky: AssertionError",
    ]
    assert lines[-3:] == notes
    assert any("1 failed, 2 passed" in line or "2 failed, 2 passed, 1 error" in line for line in lines)


def test_without_a_second_try_the_same_suite_is_red(tmp_path: Path) -> None:
    status, _ = run(tmp_path, "pytest", "-n", "2", test_flaky=FLAKY, test_dying=DYING)
    assert status == 1


def test_what_fails_again_is_red(tmp_path: Path) -> None:
    status, notes, lines = second_try(tmp_path, "-n", "2", test_flaky=FLAKY, test_broken=BROKEN)
    assert status == 1
    assert len(notes) == 2
    assert lines[-3] == "failed twice: test_broken.py::test_that_fails: AssertionError: never right"
    assert lines[-2:] == notes


def test_what_is_skipped_the_second_time_is_red(tmp_path: Path) -> None:
    status, notes, _ = second_try(tmp_path, test_skipped=SKIPPED_THEN)
    assert (status, notes) == (1, [])


def test_a_suite_that_cannot_be_collected_is_red(tmp_path: Path) -> None:
    status, notes, _ = second_try(tmp_path, test_unreadable="import nothing_of_that_name\n")
    assert (status, notes) == (2, [])


def test_a_green_run_has_no_notes(tmp_path: Path) -> None:
    status, notes, lines = second_try(tmp_path, test_fine="def test_fine():\n    pass\n")
    assert (status, notes) == (0, [])
    assert "1 passed" in lines[-1]


def test_a_test_that_cannot_be_stopped_fails_alone(tmp_path: Path) -> None:
    options = ("-n", "1", "-o", "timeout=0.5", "-v")
    status, output = run(tmp_path, "pytest", *options, test_hanging=HANGING, conftest=GUARDED)
    assert status == 1
    assert "1 failed, 1 passed" in output
    assert "crashed while running 'test_hanging.py::test_that_hangs'" in output


def test_the_guard_waits_for_fixtures_to_end() -> None:
    assert GRACE_S >= 30

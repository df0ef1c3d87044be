"""A run of the tests in which each that fails is run once more, alone, at the end: `scripts/test --second-try NOTES`.

A test that passes alone is flaky. The run is green then, and says so: its last lines, and the file NOTES, have
`flaky: <test>: <first failure>` for each. `python -m tests.support.second_try NOTES <options of pytest>` does it. The same
module is the pytest plugin that writes down what failed.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

MOST_FAILED = 10
"""With more than these something is broken, and no second try is made."""
OUTCOMES = "SECOND_TRY_OUTCOMES"
"""The environment variable that names the file for the plugin."""


@dataclass
class Outcomes:
    """What came of a run: each failed test with its first failure in a line, and how many passed."""

    failed: dict[str, str] = field(default_factory=dict)
    passed: int = 0


class Recorder:
    """Writes the outcomes of a run into a file when it ends; with pytest-xdist those of all workers."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._outcomes = Outcomes()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Set-up and tear-down can fail too, and a worker that dies is a failure of the test that it was at.
        if report.failed:
            self._outcomes.failed.setdefault(report.nodeid, first_line(report))
        elif report.passed and report.when == "call":
            self._outcomes.passed += 1

    def pytest_sessionfinish(self) -> None:
        self._file.write_text(json.dumps(asdict(self._outcomes)))


def first_line(report: pytest.TestReport) -> str:
    """What a test failed with, in a line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr).strip()
    return text.splitlines()[0] if text else "no reason given"


def pytest_configure(config: pytest.Config) -> None:
    """Records, in the process that reports: not in the workers of pytest-xdist."""
    if (file := os.environ.get(OUTCOMES)) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(file)), "second-try-recorder")


def run_pytest(options: list[str], folder: Path, *, quiet: bool = False) -> tuple[int, Outcomes, str]:
    """Runs pytest; its exit status, what it recorded, and with `quiet` what it printed."""
    file = folder / "outcomes.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.second_try", *options]
    environment = {**os.environ, OUTCOMES: str(file)}
    output = subprocess.PIPE if quiet else None
    done = subprocess.run(
        command, check=False, env=environment, stdout=output, stderr=output and subprocess.STDOUT, text=True
    )
    outcomes = Outcomes(**json.loads(file.read_text())) if file.exists() else Outcomes()
    return done.returncode, outcomes, done.stdout or ""


def run_twice(options: list[str], notes: Path, alone: list[str]) -> int:
    """Runs pytest with the options, then each failed test by itself with the options `alone`; the exit status.

    A run that was interrupted, or that could not collect its tests, stays what it was.
    """
    notes.write_text("")
    with tempfile.TemporaryDirectory() as name:
        status, outcomes, _ = run_pytest(options, Path(name))
        if status != pytest.ExitCode.TESTS_FAILED or not outcomes.failed:
            return status
        if len(outcomes.failed) > MOST_FAILED:
            print(f"second try: none, {len(outcomes.failed)} tests failed", flush=True)
            return status
        flaky, failing = [], []
        for test, failure in outcomes.failed.items():
            print(f"second try: {test}", flush=True)
            again, found, output = run_pytest([*alone, test], Path(name), quiet=True)
            # A test that is skipped this time has not passed.
            if again == pytest.ExitCode.OK and found.passed:
                flaky.append(f"flaky: {test}: {failure}")
            else:
                failing.append(f"failed twice: {test}: {failure}")
                print(output, flush=True)
    notes.write_text("".join(f"{line}\n" for line in flaky))
    print("\n".join([*failing, *flaky]), flush=True)
    return int(pytest.ExitCode.TESTS_FAILED if failing else pytest.ExitCode.OK)


if __name__ == "__main__":
    sys.exit(run_twice(sys.argv[2:], Path(sys.argv[1]), ["-n", "0"]))

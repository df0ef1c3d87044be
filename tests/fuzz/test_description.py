"""Thousands of requests made from the served OpenAPI document, good ones and bad ones, against a real pod: no 5xx, and no
answer that the document does not describe."""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.app import Stores
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.support.pods import gateway_process
from tests.support.serving import ADMIN_KEY
from tests.support.visiting import Flush, say

CASES = 2_000
EXAMPLES = 66
SEED = 20_260_101
UNREACHED = {"POST /api/chat/{agent_id}/cancel"}
"""Calls that only an hour's luck would have answered: no turn runs long enough to be cancelled."""


class World:
    """What there is for the requests to find: agents, and sessions with their tokens and turns."""

    def __init__(self) -> None:
        self.lists: dict[str, list[str]] = {
            "agents": ["shop"],
            "graphs": ["echo"],
            "cursors": ["0-0"],
        }
        self.token = ""
        self.operations: list[tuple[str, str, str]] = []

    async def build(self, client: httpx.AsyncClient) -> None:
        talked = await self._mint(client)
        headers = {"Authorization": f"Bearer {talked['session_token']}"}
        turns = [(await say(client, talked["session_id"], headers=headers))["metadata"]["turn_id"] for _ in range(5)]
        self.token = talked["session_token"]
        self.lists |= {"sessions": [talked["session_id"]], "turns": turns}
        entry = re.search(r"\./widget/(\w+)/([\w.-]+\.js)", (await client.get("/widget.js")).text)
        assert entry is not None
        self.lists |= {"versions": [entry[1]], "folders": ["texts"], "files": [entry[2], "de.js"]}
        for name, method, path in (
            ("ended", "POST", "/api/sessions/{session_id}/end"),
            ("erased", "DELETE", "/api/sessions/{session_id}"),
        ):
            session = await self._mint(client)
            self.lists[name] = [session["session_id"]]
            self.operations.append(
                (
                    method,
                    path,
                    "\n".join(
                        [
                            f'parameters = {{ "path.session_id" = {{ dictionary = "{name}", probability = 0.8 }} }}',
                            f'headers = {{ Authorization = "Bearer {session["session_token"]}" }}',
                        ]
                    ),
                )
            )
        # A feed never ends, and says nothing as long as nothing happens.
        self.operations.append(("GET", "/api/sessions/{session_id}/events", "request-timeout = 0.5"))

    async def _mint(self, client: httpx.AsyncClient) -> dict[str, str]:
        opened = await client.post("/api/sessions", json={"agent_id": "shop"})
        found: dict[str, str] = opened.json()
        return found

    def configuration(self) -> str:
        """What schemathesis is told: real names beside made-up ones, the keys, and what counts as good."""
        bound = {
            "path.agent_id": "agents",
            "path.session_id": "sessions",
            "path.turn_id": "turns",
            "path.version": "versions",
            "path.folder": "folders",
            "path.file": "files",
            "query.session_id": "sessions",
            "query.agent_id": "agents",
            "body.agent_id": "agents",
            "body.session_id": "sessions",
            "body.graph": "graphs",
            "header.Last-Event-ID": "cursors",
        }
        lines = [
            f"seed = {SEED}",
            # With two, CPython 3.11 can fail to parse what hypothesis shows of itself; and one has one order.
            "workers = 1",
            "continue-on-failure = true",
            "max-stream-events = 1",
            "request-timeout = 20",
            "[generation]",
            f"max-examples = {EXAMPLES}",
            "no-shrink = true",
            'database = "none"',
            "[auth.openapi.admin]",
            f"bearer = {json.dumps(ADMIN_KEY)}",
            "[auth.openapi.session]",
            f"bearer = {json.dumps(self.token)}",
            "[checks.positive_data_acceptance]",
            # What is well-formed can still come too late, or name a graph that there is not.
            'expected-statuses = ["2xx", "3xx", "401", "403", "404", "409", "410", "422", "429"]',
            "[dictionaries]",
            *[f"{name} = {{ values = {json.dumps(values)} }}" for name, values in self.lists.items()],
            "[parameters]",
            *[f'"{where}" = {{ dictionary = "{name}", probability = 0.8 }}' for where, name in bound.items()],
        ]
        for method, path, options in self.operations:
            lines += ["[[operations]]", f'include-name = "{method} {path}"', options]
        return "\n".join(lines)


@pytest.mark.timeout(600)
async def test_every_answer_is_one_that_the_description_knows(
    settings: Settings,
    stores: Stores,
    put_agent: PutAgent,
    flush: Flush,
    tmp_path: Path,
) -> None:
    await put_agent("shop")
    world = World()
    async with gateway_process("serve", settings, tmp_path) as pod:
        async with httpx.AsyncClient(base_url=pod.url) as client:
            await world.build(client)
        (tmp_path / "schemathesis.toml").write_text(world.configuration())
        # Those that change agents come last: the others need theirs.
        changing = [f"{method} /api/agents/{{agent_id}}" for method in ("PUT", "PATCH", "DELETE")]
        reports = [
            await run_schemathesis(tmp_path, pod.url, *[f"--exclude-name={name}" for name in changing]),
            await run_schemathesis(tmp_path, pod.url, *[f"--include-name={name}" for name in changing]),
        ]
        assert pod.process.poll() is None, "the pod ended"
    cases = sum(report["test_cases"]["generated"] for report in reports)
    assert sum(report["operations"]["tested"] for report in reports) == reports[0]["operations"]["total"]
    assert cases >= CASES, f"only {cases} cases"
    rates = reports[0]["valid_rates"] | reports[1]["valid_rates"]
    unreached = {call for call, phases in rates.items() if not any(counts["accepted"] for counts in phases.values())}
    assert unreached <= UNREACHED, "some calls were never answered with what they are for"
    await flush()
    assert await stores.outbox.dead_letters() == []
    print(f"{cases} cases in {sum(report['running_time'] for report in reports):.0f} s")


async def run_schemathesis(folder: Path, url: str, *which: str) -> dict[str, Any]:
    """Runs all phases with all checks, which must find nothing; the report."""
    program, report_file = Path(sys.executable).with_name("st"), folder / "report.json"
    arguments = ["--config-file", "schemathesis.toml", "run", f"{url}/openapi.json", "--checks", "all", *which]
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        "--report-json-path",
        report_file,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert report_file.exists(), output.decode()
    report: dict[str, Any] = json.loads(report_file.read_text())
    report_file.unlink()
    assert (report["exit_code"], report["failures"], report["errors"]) == (0, [], []), output.decode()
    return report

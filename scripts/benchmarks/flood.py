"""What a flood from others costs normal visitors of one pod: `scripts/bench flood`.

Visitors send messages at a steady pace, each from an address of its own. In turn with calm times, other addresses send ten
times what their limit allows, once they have used up its burst. The flood comes from a process of its own, flooder.py.
"""

import argparse
import asyncio
import json
import sys
from collections import Counter
from contextlib import suppress
from os import sysconf
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import NamedTuple

from scripts.benchmarks.flooder import BURST, HOST, LIMIT_PER_S, Line, pace
from scripts.benchmarks.servers import KEY, gateway, own_servers

LEAD_S = 1.0
"""For how long the flood runs before the visitors are measured."""


class Flooder:
    """The process that floods."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def answer(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    def go(self, seconds: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n".encode())

    async def end(self) -> None:
        with suppress(ProcessLookupError):
            self._process.terminate()
        await self._process.wait()


class Round(NamedTuple):
    """The median and the 99th percentile of the visitors' times in ms, and the pod's share of a processor in percent."""

    p50: float
    p99: float
    cpu: float

    def __str__(self) -> str:
        return f"p50 {self.p50:6.1f} p99 {self.p99:6.1f} ms, pod {self.cpu:3.0f}%"


async def measure_flood(options: argparse.Namespace) -> None:
    """Prints the visitors' times in calm and in the flood, in turn, and by how much the 99th percentile grows."""
    limits = {"GATEWAY_TRUSTED_PROXIES": HOST, "GATEWAY_ADDRESS_RATE_LIMIT": f"{BURST}/{BURST // LIMIT_PER_S}"}
    with own_servers(**limits) as servers, gateway("serve", servers) as process_id:
        port = int(servers.environment["GATEWAY_PORT"])
        await _put_agent(port, KEY, options.delay_ms)
        visitors = [
            Line(port, f"198.51.100.{number + 1}", f"session_visitor_{number:06d}") for number in range(options.visitors)
        ]
        command = [sys.executable, "-m", "scripts.benchmarks.flooder", str(port), str(options.flooders), str(options.times)]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        flooder = Flooder(process)
        try:
            assert await flooder.answer() == "ready", "the flood cannot begin"
            await _round(visitors, options, 2, process_id)
            calm: list[Round] = []
            flooded: list[Round] = []
            answered = Counter[str]()
            for number in range(1, options.rounds + 1):
                calm.append(await _round(visitors, options, options.seconds, process_id))
                flooder.go(options.seconds + LEAD_S)
                assert await flooder.answer() == "flooding"
                await asyncio.sleep(LEAD_S)
                flooded.append(await _round(visitors, options, options.seconds, process_id))
                answered.update(json.loads(await flooder.answer()))
                print(f"round {number}: calm {calm[-1]}; flood {flooded[-1]}", flush=True)
        finally:
            await flooder.end()
            for visitor in visitors:
                visitor.close()
    _print(options, calm, flooded, answered)


def _print(options: argparse.Namespace, calm: list[Round], flooded: list[Round], answered: Counter[str]) -> None:
    sent = sum(answered.values()) / (options.rounds * (options.seconds + LEAD_S))
    wanted = options.times * LIMIT_PER_S * options.flooders
    by_status = ", ".join(f"{count:,} {status}" for status, count in sorted(answered.items()))
    print(
        f"{options.visitors} visitors send {options.per_s:g} messages a second to one pod, all answered; "
        f"{options.flooders} addresses send {options.times:g} times their limit, "
        f"{sent:,.0f} a second together ({wanted:,.0f} wanted): {by_status}"
    )
    print(f"medians of {options.rounds} rounds of {options.seconds:g} s, in turn:")
    for name, unit in (("p50", "ms"), ("p99", "ms"), ("cpu", "% ")):
        before, after = (median(getattr(one, name) for one in rounds) for rounds in (calm, flooded))
        print(f"  {name}   calm {before:7.1f} {unit}   flood {after:7.1f} {unit}   ratio {after / before:5.2f}")


async def _round(visitors: list[Line], options: argparse.Namespace, seconds: float, process_id: int) -> Round:
    times: list[float] = []
    began, cpu_s = perf_counter(), _cpu_s(process_id)

    def seen(status: int, waited_s: float) -> None:
        assert status == 200, f"a visitor was answered {status}"
        times.append(waited_s * 1000)

    await pace(visitors, options.per_s, seconds, seen)
    cpu = 100 * (_cpu_s(process_id) - cpu_s) / (perf_counter() - began)
    return Round(median(times), quantiles(times, n=100)[98], cpu)


def _cpu_s(process_id: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / sysconf("SC_CLK_TCK")


async def _put_agent(port: int, key: str, delay_ms: float) -> None:
    content = json.dumps({"graph": "echo", "config": {"delay_ms": delay_ms}, "rate_limit": None}).encode()
    head = (
        f"PUT /api/agents/bench HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    for _ in range(200):
        try:
            reader, writer = await asyncio.open_connection(HOST, port)
            break
        except OSError:
            await asyncio.sleep(0.1)
    writer.write(head.encode() + content)
    answer = await reader.readline()
    writer.close()
    assert b" 201 " in answer, answer

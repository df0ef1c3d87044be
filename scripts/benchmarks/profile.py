"""Where the time of a turn goes in a pod, looked at by py-spy while it is loaded: `scripts/bench profile`."""

import argparse
import asyncio
import re
import sys
from collections import Counter
from pathlib import Path

from scripts.benchmarks.measure import FOLDER, GATEWAY, PRODUCTION, Serving, load, plan_for, serve, take_cores
from scripts.benchmarks.seed import fill_gateway, fill_peer
from scripts.benchmarks.servers import own_servers

SESSIONS = 2000
CONNECTIONS = 32
SAMPLES_PER_S = 200
TOP = 40
# "function (file:line)", the file whole.
FRAME = re.compile(r"(?P<function>.*) \((?P<file>[^()]*?)(:\d+)?\)$")
PACKAGE = re.compile(r"/site-packages/(?P<package>[^/.]+)")
OWN = re.compile(r"/(?P<package>gateway|persistence)/")


async def measure_profile(options: argparse.Namespace) -> None:
    """Leaves a flame graph and lists of functions and packages in .bench."""
    cores = take_cores()
    FOLDER.mkdir(exist_ok=True)
    name = f"profile-{options.row}"
    graph, lists, raw = (FOLDER / f"{name}.{ending}" for ending in ("svg", "txt", "raw"))
    with own_servers(**PRODUCTION) as servers:
        if options.row in GATEWAY:
            await fill_gateway(servers, SESSIONS, options.history)
        else:
            await fill_peer(servers, options.row, SESSIONS, options.history)
        with serve(options.row, servers, cores) as serving:
            plan = plan_for(serving, range(SESSIONS), connections=CONNECTIONS)
            await load(plan, 2)
            loading = asyncio.create_task(load(plan, 2 * options.seconds + 2))
            await _record(serving, "flamegraph", graph, options)
            await _record(serving, "raw", raw, options)
            measured = await loading
    text = summary(raw.read_text().splitlines(), len(measured.latencies_ms) / measured.seconds)
    lists.write_text(text)
    raw.unlink()
    print(text)
    print(f"in .bench: {graph.name} (open it in a browser), {lists.name}")


async def _record(serving: Serving, kind: str, file: Path, options: argparse.Namespace) -> None:
    """One recording. The profiler keeps to the cores of the load: all it costs the pod are the pauses for its looks."""
    command = ["record", "--pid", str(serving.server.pid), "--format", kind, "--output", str(file), "--function"]
    command += ["--duration", str(int(options.seconds)), "--rate", str(SAMPLES_PER_S), "--threads"]
    # The lists want to know whose a file is; the graph is read by people.
    command += ["--full-filenames"] if kind == "raw" else []
    command += ["--native"] if options.native else []
    tool = Path(sys.executable).parent / "py-spy"
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(str(tool), *command, stdout=pipe, stderr=pipe)
    _, errors = await process.communicate()
    if process.returncode:
        sys.exit(f"bench: py-spy cannot look into the pod; it may need root: {errors.decode(errors='replace').strip()}")


def summary(stacks: list[str], turns_per_s: float) -> str:
    """Packages and functions by the time that they are at work themselves, functions of the gateway also with all they call.

    `stacks` are py-spy's: "outermost;…;innermost count"."""
    packages: Counter[str] = Counter()
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for stack in stacks:
        text, _, count = stack.rpartition(" ")
        frames = [frame for frame in text.split(";") if not frame.startswith(("thread ", "process "))]
        if not frames:
            continue
        samples = int(count)
        package, label = _read(frames[-1])
        packages[package] += samples
        own[label] += samples
        within.update(
            dict.fromkeys({label for package, label in map(_read, frames) if package in ("gateway", "persistence")}, samples)
        )
    whole = packages.total() or 1
    parts = [f"{whole} samples of a pod that answers {turns_per_s:,.0f} turns a second while it is looked at"]
    for title, counted in (
        ("packages, by their own time", packages),
        ("functions, by their own time", own),
        ("functions of the gateway, with all that they call", within),
    ):
        parts.append(f"\n{title}")
        parts += [f"{samples / whole:>8.1%}  {label}" for label, samples in counted.most_common(TOP)]
    return "\n".join(parts) + "\n"


def _read(frame: str) -> tuple[str, str]:
    """The package of a frame, and the function as it is listed."""
    match = FRAME.match(frame)
    if match is None:
        return "(native)", frame
    file, function = match["file"], match["function"]
    found = PACKAGE.search(file) or OWN.search(file)
    if found:
        package = found["package"]
        return package, f"{function}  {file[found.start('package') :]}"
    if file.startswith(("/", "<")) and file.endswith((".py", ">")):
        return "(standard library)", f"{function}  {'/'.join(file.split('/')[-2:])}"
    return "(native)", f"{function}  {file.rsplit('/', 1)[-1]}"

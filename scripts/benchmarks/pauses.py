"""Notes how long the garbage collector stops a server under test: imported by it, written out when it ends.

`python -P pauses.py <module> <arguments>` runs a module as `python -m` does, with its collector watched. It imports nothing
of this checkout, so that the gateway of another one can be run by it.
"""

import atexit
import gc
import json
import os
import runpy
import sys
from pathlib import Path
from time import monotonic
from typing import Any


def watch_collector() -> None:
    """From now on; [moment (monotonic seconds), milliseconds] of each pause go to the file that BENCH_PAUSES names."""
    pauses: list[tuple[float, float]] = []
    began = 0.0

    def collected(phase: str, info: dict[str, Any]) -> None:
        nonlocal began
        if phase == "start":
            began = monotonic()
        else:
            now = monotonic()
            pauses.append((now, (now - began) * 1000))

    gc.callbacks.append(collected)
    atexit.register(lambda: Path(os.environ["BENCH_PAUSES"]).write_text(json.dumps(pauses)))


def longest_ms(file: Path, begin: float, end: float) -> float:
    """The longest pause between two moments, in milliseconds. Raises FileNotFoundError when the server wrote nothing."""
    pauses = json.loads(file.read_text())
    return max((ms for moment, ms in pauses if begin <= moment <= end), default=0.0)


if __name__ == "__main__":
    watch_collector()
    # What is run sees its own name and arguments.
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

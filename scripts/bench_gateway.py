"""`python -m gateway`, with its garbage collector watched."""

import sys

from bench_pauses import watch_collector

from gateway.cli import main

if __name__ == "__main__":
    watch_collector()
    sys.exit(main(sys.argv[1:]))

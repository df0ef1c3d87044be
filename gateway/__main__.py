"""`python -m gateway`, and the console script `gateway`."""

import sys

from gateway.cli import main


def run() -> None:
    """Runs the command line and exits with its status."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()

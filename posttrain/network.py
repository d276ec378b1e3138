"""Ports and servers of this machine.

Example:
    >>> 0 < free_port() < 65536
    True
"""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException

HOST = "127.0.0.1"


def free_port(port: int = 0) -> int:
    """Return `port` if no process listens there, or any free port for 0. Raises OSError if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        return int(probe.getsockname()[1])


def is_listening(host: str, port: int) -> bool:
    """Return True if a process accepts connections at the address within two seconds."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def answers(url: str) -> bool:
    """Return True if a server answers the URL with success within two seconds."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except (urllib.error.URLError, OSError, HTTPException):
        return False
    return True


@contextmanager
def shut_after(connection: HTTPConnection, seconds: float) -> Iterator[None]:
    """Open the connection, and raise TimeoutError if the block takes longer than `seconds`.

    A socket's own limit is one for each read: a server that sends a byte from time to time would hold the block for ever.
    """
    began = time.monotonic()
    connection.connect()
    sock, expired = connection.sock, threading.Event()

    def shut() -> None:
        expired.set()
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads, which close() would not

    timer = threading.Timer(max(0.0, seconds - (time.monotonic() - began)), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, HTTPException) as error:
        if expired.is_set():
            raise TimeoutError(f"no whole answer within {seconds:g} s") from error
        raise
    finally:
        timer.cancel()
    if expired.is_set():  # an answer without a length ends with the connection, and may be cut
        raise TimeoutError(f"no whole answer within {seconds:g} s")


def wait_until(
    condition: Callable[[], bool], alive: Callable[[], bool], seconds: float, poll_seconds: float = 0.1
) -> bool:
    """Wait until a condition holds. Return False if the process that should bring it about ended, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not alive() or time.monotonic() > deadline:
            return False
        time.sleep(poll_seconds)
    return True

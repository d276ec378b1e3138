"""Addresses at which processes listen, and servers that answer with any bytes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import psutil


def addresses(processes: Iterable[psutil.Process]) -> set[str]:
    """Every address at which one of these processes accepts connections."""
    sockets = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            sockets += process.net_connections("inet")
    return {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return the process and everything below it."""
    return [process, *process.children(recursive=True)]


def command_line(process: psutil.Process) -> str:
    """Return the command line of a process, which is empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # also a process that its parent has not yet waited for
        return ""


@contextmanager
def answering(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """Yield the address of a server that reads one request and answers with a function of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/hook"
        thread.join()

"""Find out if a server of ours is the one that listens on a port."""

from __future__ import annotations

import psutil


def listens(pid: int, port: int) -> bool:
    """Return True if a process, or one below it, takes connections on a port of this machine.

    A different user's process may have taken the port a moment before: only our own server may be sent a password.
    """
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return False
    return any(_listens(process, port) for process in family)


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        sockets = process.net_connections("inet")
    except psutil.NoSuchProcess:
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in sockets)

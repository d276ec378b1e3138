"""Addresses at which processes listen."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def addresses(processes: Iterable[psutil.Process]) -> set[str]:
    """Every address at which one of these processes accepts connections."""
    sockets = [each for process in processes for each in process.net_connections("inet")]
    return {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return the process and everything below it."""
    return [process, *process.children(recursive=True)]

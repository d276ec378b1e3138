"""HTTP connections to a vLLM server: by its address, or by a Unix socket, which only the owner of its folder can reach.

Example:
    >>> new_connection("http://127.0.0.1:8000", 1.0).port
    8000
    >>> new_connection("unix:/run/vllm/socket", 1.0).path
    '/run/vllm/socket'
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

from posttrain.errors import RolloutError

UNIX = "unix:"
LONGEST_SOCKET = 103
"""Bytes of a socket's path: the kernel takes 107, macOS 103."""


class UnixConnection(HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        """Open the socket. Raises OSError if no server listens on it."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def new_connection(url: str, seconds: float) -> HTTPConnection:
    """Return a connection, not yet opened, to `http://…`, `https://…` or `unix:PATH`."""
    if url.startswith(UNIX):
        return UnixConnection(url.removeprefix(UNIX), seconds)
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    return kind(parts.netloc, timeout=seconds)


def base_path(url: str) -> str:
    """Return the part of a URL that comes before the path of every request."""
    return "" if url.startswith(UNIX) else urlsplit(url).path


def private_folder(name_length: int) -> Path:
    """Make a folder of mode 0700 for sockets with names of up to so many characters.

    Raises:
        RolloutError: the path of a socket in it would be too long, or the folder for temporary files is full or read-only.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="posttrain-"))
    except OSError as error:
        raise RolloutError(
            f"cannot make a folder for the vLLM server's socket: {error}. Free space, or set TMPDIR"
        ) from error
    if len(bytes(folder)) + 1 + name_length > LONGEST_SOCKET:
        shutil.rmtree(folder, ignore_errors=True)
        raise RolloutError(
            f"the folder for temporary files, {folder.parent}, has too long a path for a socket in it. Set TMPDIR to a shorter one,"
            " e.g. /tmp"
        )
    return folder

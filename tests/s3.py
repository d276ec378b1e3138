"""An S3 server as a separate process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import Request, urlopen

from posttrain.network import free_port

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "posttrain-test",
    "AWS_SECRET_ACCESS_KEY": "posttrain-test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def serving(bucket: str) -> Iterator[str]:
    """Return the address of a server that holds this empty bucket."""
    port = free_port(0)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while not _made(f"{url}/{bucket}"):
            assert time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _made(url: str) -> bool:
    try:
        urlopen(Request(url, method="PUT"), timeout=5).close()
    except (URLError, OSError):
        return False
    return True

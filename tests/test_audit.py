"""The audit of dependencies: skipped aloud without its database, and failed by a known vulnerability."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from posttrain.network import free_port


def audit(root: Path, url: str, tool: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OSV_URL": url, "AUDIT_VENV": str(tool)}
    return subprocess.run([root / "infra" / "audit.sh"], env=env, capture_output=True, text=True)


@pytest.fixture
def database() -> Iterator[str]:
    """An advisory database that answers."""

    class Database(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Database) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/query"
        server.shutdown()


def test_without_the_database_it_says_so_and_passes(root: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port(0)}/query"
    done = audit(root, url, tmp_path)
    assert (done.returncode, done.stdout) == (0, f"audit: skipped: the advisory database {url} does not answer\n")


@pytest.mark.parametrize("status", [0, 1])
def test_with_it_every_pin_is_asked_about_and_the_verdict_is_the_tools(
    root: Path, tmp_path: Path, database: str, status: int
) -> None:
    """A stand-in for the tool records its arguments: the real one needs packages from the network."""
    tool = tmp_path / "bin" / "pip-audit"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\nexit {status}\n')
    tool.chmod(0o755)
    assert audit(root, database, tmp_path).returncode == status
    told = (tmp_path / "told").read_text()
    assert "--requirement constraints.txt --no-deps --disable-pip" in told
    assert f"--vulnerability-service osv --osv-url {database}" in told

"""A vLLM server that a run starts: other users, web pages and other programs of the machine cannot ask it or load weights into it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from posttrain.errors import RolloutError
from posttrain.rollouts.engine import Completion
from posttrain.rollouts.vllm import VllmEngine
from posttrain.rollouts.vllm.local import LocalServer
from tests.pipelines.conftest import wait_for
from tests.rollouts.test_vllm_local import REQUESTS, SETTINGS, launch, peer_engine, script, started

LOAD = """
import http.client, json, os, socket, sys
os.setgid(65534); os.setgroups([]) if os.getuid() == 0 else None; os.setuid(65534)
connection = http.client.HTTPConnection("localhost")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(sys.argv[1])
connection.request("POST", "/collective_rpc", json.dumps({"method": "reload_weights", "kwargs": {"weights_path": sys.argv[2]}}))
print(connection.getresponse().status)
"""
"""What another user would run: ask the server to load the weights of a folder."""


@pytest.fixture
def engine(tmp_path: Path, root: Path) -> Iterator[VllmEngine]:
    before = os.umask(0)  # modes must not depend on it
    made = peer_engine(tmp_path, root, "folder")
    yield made
    made.close()
    os.umask(before)


def socket_of(engine: VllmEngine) -> Path:
    (server,) = engine.fleet.servers
    assert isinstance(server, LocalServer)
    assert server.socket is not None
    return server.socket


def test_it_listens_on_no_port_and_another_user_cannot_load_weights(engine: VllmEngine) -> None:
    answers = engine.sample(REQUESTS, SETTINGS)
    listening = [c for p in started(engine) for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == []
    folder = socket_of(engine).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == os.getuid()
    if os.geteuid() == 0:  # only root can act as a different user
        _attacks(engine, answers)
    engine.close()
    assert not folder.exists()


def _attacks(engine: VllmEngine, answers: list[list[Completion]]) -> None:
    """Refused with the folder's mode, and only because of it."""
    socket = socket_of(engine)
    command = [sys.executable, "-I", "-S", "-c", LOAD, str(socket), str(engine.weights)]

    def attack() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)

    refused = attack()
    assert refused.returncode == 1
    assert "PermissionError" in refused.stderr
    assert engine.sample(REQUESTS, SETTINGS) == answers
    socket.parent.chmod(0o777)
    assert attack().stdout == "200\n"


KILLED = """
import sys, time
from pathlib import Path
from tests.rollouts.test_vllm_local import LocalServer, launch
server = LocalServer(launch(Path(sys.argv[1])), Path(sys.argv[2]))
print(server._socket().parent, flush=True)
server.update(Path(sys.argv[2]).parent)
"""


def test_a_killed_run_leaves_no_folder_of_its_server(tmp_path: Path, root: Path) -> None:
    python = script(tmp_path / "python", f"touch {tmp_path}/began; exec sleep 1000")
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(python), str(tmp_path / "vllm.log")],
                           cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert run.stdout is not None
    folder = Path(run.stdout.readline().strip())
    wait_for((tmp_path / "began").exists, 120)
    assert folder.is_dir()
    run.kill()
    run.wait()
    wait_for(lambda: not folder.exists(), 120)


def test_a_temporary_folder_with_too_long_a_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(RolloutError, match=r"too long a path for a socket.*Set TMPDIR"):
        LocalServer(launch(tmp_path / "python"), tmp_path / "vllm.log").update(tmp_path)
    assert list(long.iterdir()) == []

"""A server that this process starts: started again when it is killed, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from posttrain.errors import RolloutError
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.vllm import VllmEngine
from posttrain.rollouts.vllm.local import Launch, LocalServer
from posttrain.rollouts.vllm.probe import sequences
from tests.models import small
from tests.pipelines.conftest import wait_for
from tests.rollouts.real import family, gone

REQUESTS = [Request((5, 6, 7), ((0, 0), (0, 1)))]
SETTINGS = SamplingSettings(4, 1.0)


def launch(python: Path, seconds: float = 120.0) -> Launch:
    return Launch(str(python), "tokenizer", "float32", context=64, start_seconds=seconds, fetches=True)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def peer_engine(tmp_path: Path, root: Path, transfer: str) -> VllmEngine:
    """Return an engine on a server whose interpreter runs the tests' small one instead of vLLM, with a child as vLLM has them."""
    command = f'sleep 1000 &\ncd {root} && exec {sys.executable} {root}/tests/rollouts/peer.py "$@"'
    server = LocalServer(launch(script(tmp_path / "python", command)), tmp_path / "vllm.log")
    return VllmEngine(
        small.language_model(),
        small.EOS,
        [server],
        version=lambda: 0,
        folder=tmp_path / "served",
        probes=sequences([(5, 6, 7)], 259, 64),
        transfer=transfer,
    )


@pytest.fixture
def engine(tmp_path: Path, root: Path) -> Iterator[VllmEngine]:
    made = peer_engine(tmp_path, root, "memory")
    yield made
    made.close()


def started(engine: VllmEngine) -> list[psutil.Process]:
    """Return the guard and all that runs under it."""
    (server,) = engine.fleet.servers
    assert isinstance(server, LocalServer)
    assert server._process is not None
    return family(server._process.pid)


def test_a_killed_server_is_started_again_and_none_is_left_behind(
    engine: VllmEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = engine.sample(REQUESTS, SETTINGS)
    first = started(engine)
    # the guard, the server, and the server's own child
    assert len(first) == 3
    (serving,) = [p for p in first if any("peer.py" in part for part in p.cmdline())]
    serving.kill()
    assert engine.sample(REQUESTS, SETTINGS) == answers
    assert "starting a vLLM server" in capsys.readouterr().err
    assert gone(first)
    second = started(engine)
    engine.close()
    assert gone(second)
    assert not engine.folder.exists()


def test_a_server_that_cannot_start_is_quoted(tmp_path: Path) -> None:
    python = script(tmp_path / "python", "echo 'ValueError: no such architecture' >&2; exit 1")
    server = LocalServer(launch(python), tmp_path / "vllm.log")
    with pytest.raises(RolloutError, match=r"exited during its start(.|\n)*ValueError: no such architecture"):
        server.update(tmp_path)
    # the log still has the lines of the start before
    script(tmp_path / "python", "exit 3")
    with pytest.raises(RolloutError, match=rf"start and wrote nothing, .*Try: {python} -m vllm\.entry"):
        server.update(tmp_path)


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    server = LocalServer(launch(script(tmp_path / "python", "exec sleep 1000"), seconds=1.0), tmp_path / "vllm.log")
    with pytest.raises(RolloutError, match="did not answer within 1 seconds"):
        server.update(tmp_path)
    assert server._process is not None
    processes = [psutil.Process(server._process.pid)]
    server.close()
    assert gone(processes)


PARENT = """
import subprocess, time
from posttrain.guard import guarded_group
command = "sleep 1000 & echo $! > grandchild; sleep 1000"
subprocess.Popen(guarded_group(["sh", "-c", command]), start_new_session=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_whole_group_ends_with_the_process_that_asked_for_it(root: Path, tmp_path: Path, number: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)})
    grandchild = tmp_path / "grandchild"
    wait_for(lambda: grandchild.exists() and grandchild.read_text().strip())
    process = psutil.Process(int(grandchild.read_text()))
    group = [psutil.Process(parent.pid).children()[0], process]
    assert os.getpgid(process.pid) == group[0].pid
    parent.send_signal(number)
    parent.wait()
    wait_for(lambda: gone(group))


def test_next_to_a_trainer_the_server_gets_a_share_of_the_memory() -> None:
    alone, beside = (
        Launch("python", "tokenizer", "bfloat16", context=64, memory_share=share).command(Path("w"), Path("s"))
        for share in (None, 0.37)
    )
    assert "--gpu-memory-utilization" not in alone
    assert beside[beside.index("--gpu-memory-utilization") + 1] == "0.37"

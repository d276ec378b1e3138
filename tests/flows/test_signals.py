import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType

from tests.sockets import addresses

LONG = """
stages:
  long:
    cmd: python long.py
    outs: [long.txt]
  after:
    cmd: python -c 'open("after.txt", "w")'
    deps: [long.txt]
    outs: [after.txt]
"""

PROGRAM = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
open("pids.tmp", "w").write(f"{os.getpid()} {child.pid}")
os.rename("pids.tmp", "pids")
time.sleep(120)
"""


@pytest.fixture
def long(workspace: Path, prefect_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "prefect").mkdir()
    shutil.copy(prefect_database, tmp_path / "prefect")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    (workspace / "dvc.yaml").write_text(LONG)
    (workspace / "long.py").write_text(PROGRAM)
    return workspace


def start(root: Path, api: str | None) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    command = [sys.executable, "-m", "flows.compare", "--root", str(root), "--no-tracking"]
    return subprocess.Popen(
        command,
        env={**environ, **({"PREFECT_API_URL": api} if api else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def command_line(pid: int) -> str:
    """Return the command of a process, "" for one that has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def step_and_family(flow: subprocess.Popen[str], root: Path) -> list[int]:
    """Every process at work below the flow, once the step is at work."""
    until(lambda: (root / "pids").exists())
    pids = [process.pid for process in psutil.Process(flow.pid).children(recursive=True) if running(process.pid)]
    assert {int(word) for word in (root / "pids").read_text().split()} <= set(pids)
    return pids


SLOW = (pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(signal.SIGHUP, marks=pytest.mark.slow))


@pytest.mark.parametrize("number", [signal.SIGTERM, *SLOW])
def test_a_signal_ends_the_stage_and_all_its_processes(long: Path, prefect_url: str, number: signal.Signals) -> None:
    flow = start(long, prefect_url)
    pids = step_and_family(flow, long)
    flow.send_signal(number)
    output = flow.communicate(timeout=300)[0]
    assert flow.returncode == 143, output
    assert f"stopped by {number.name}; finished stages are kept, and the next run continues" in output
    assert not any(running(pid) for pid in pids)
    assert not (long / "after.txt").exists()


def test_a_run_that_is_cancelled_in_prefect_stops_its_stage_and_says_so(long: Path, prefect_url: str) -> None:
    flow = start(long, prefect_url)
    pids = step_and_family(flow, long)
    step = [int(word) for word in (long / "pids").read_text().split()]
    identity = UUID((long / ".posttrain" / "flow.run").read_text())
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(identity, State(type=StateType.CANCELLING))  # `prefect flow-run cancel` does this
        until(lambda: not any(running(pid) for pid in step))
        output = flow.communicate(timeout=300)[0]
        state = client.read_flow_run(identity).state
    assert flow.returncode == 143, output
    assert "long                     stopped: long was stopped; its checkpoint is kept" in output
    assert "\ncancelled in Prefect; finished stages are kept, and the next run continues\n" in output
    assert state is not None
    assert state.is_cancelled()
    assert not any(running(pid) for pid in pids)


@pytest.mark.servers
def test_a_killed_flow_leaves_no_stage_and_no_server_behind(long: Path) -> None:
    flow = start(long, None)
    pids = step_and_family(flow, long)
    assert any("server start" in command_line(pid) for pid in pids)
    assert addresses(psutil.Process(pid) for pid in pids if running(pid)) == {"127.0.0.1"}
    refused = start(long, None)
    output = refused.communicate(timeout=300)[0]
    assert refused.returncode == 2, output
    assert f"a flow is already running in {long} (process {flow.pid})" in output
    flow.kill()
    flow.communicate()
    until(lambda: not any(running(pid) for pid in pids), 30)

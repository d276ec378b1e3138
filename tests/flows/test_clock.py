"""The wall clock jumps by days while a flow and its own Prefect server are at work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clock import DAY, NEEDED, Clock
from tests.pipelines.conftest import wait_for

pytestmark = [pytest.mark.slow, NEEDED]


@pytest.mark.timeout(900)
def test_jumps_change_no_stage_of_a_flow(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the flow's own Prefect server, whose clock jumps too."""
    clock = Clock(tmp_path_factory.mktemp("clock"))
    (workspace / "work.py").write_text("import time; time.sleep(3)\n" + (workspace / "work.py").read_text())
    command = [sys.executable, "-m", "flows.compare", "--root", str(workspace), "--no-tracking"]
    inherited = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    flow = subprocess.Popen(
        command, env=inherited | clock.variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for name, jump in (("start", 3 * DAY), ("side-left", -40 * DAY), ("side-right", 0)):
        wait_for(lambda name=name: (workspace / f"{name}.txt").exists() or flow.poll() is not None, 600)
        clock.jump_to(jump)
    output = flow.communicate(timeout=600)[0]
    assert flow.returncode == 0, output
    assert "Traceback" not in output
    assert (workspace / "join.txt").read_text() == "7"
    lines = (workspace / "times.jsonl").read_text().splitlines()
    assert len(lines) == 4, "no stage ran twice"

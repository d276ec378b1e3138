"""Processes that outlive their command are found again, whatever the clock does, and a reader may go away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra.processes import Processes, Service, birth

SLEEP = [sys.executable, "-c", "import time; time.sleep(100)"]


def test_a_step_of_the_clock_does_not_hide_a_running_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(tmp_path, tmp_path)
    processes.start(Service("sleeper", SLEEP, {}, lambda: True))
    pid = processes.pid("sleeper")
    assert pid is not None
    # psutil derives the time of creation from the clock: after a step of 5 s it differs
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 5.0)
    assert processes.pid("sleeper") == pid
    assert processes.stop("sleeper")
    assert processes.pid("sleeper") is None


def test_a_pid_that_belongs_to_a_later_process_counts_as_ended(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEP) as other:
        boot, _, ticks = birth(other.pid).partition("/")
        for born in (f"{boot}/{int(ticks) - 1}", f"another-boot/{ticks}", "1764420000.5"):
            (tmp_path / "sleeper.pid").write_text(f"{other.pid} {born}\n")
            assert Processes(tmp_path, tmp_path).pid("sleeper") is None
            assert not Processes(tmp_path, tmp_path).stop("sleeper")
        assert other.poll() is None, "a foreign process is not killed"
        other.kill()


def test_a_reader_that_goes_away_is_no_traceback(root: Path) -> None:
    code = "from pipelines.runtime.command_line import print_text; print_text('line\\n' * 100000)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from posttrain.guard import guarded

STUBBORN = """
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(60)
"""


def gone(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def pids_in(path: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().split()) == count:
            return [int(word) for word in path.read_text().split()]
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def test_the_commands_exit_status_is_the_guards() -> None:
    assert subprocess.run(guarded(["sh", "-c", "exit 7"])).returncode == 7
    assert subprocess.run(guarded(["sh", "-c", "kill -9 $$"])).returncode == 128 + 9


def test_stop_gives_int_first_so_that_a_step_can_write_its_checkpoint(tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
def save(*_):
    open(sys.argv[2], "w").write("saved"); sys.exit(143)
signal.signal(signal.SIGINT, save)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    guard = subprocess.Popen(guarded([sys.executable, "-c", script, str(ready), str(saved)]))
    pids_in(ready, 1)
    guard.terminate()
    assert guard.wait(60) == 143
    assert saved.read_text() == "saved"


def test_stop_ends_a_group_that_ignores_every_polite_signal(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    guard = subprocess.Popen(guarded([sys.executable, "-c", STUBBORN, str(ready)], grace_seconds=0.2))
    pids = pids_in(ready, 2)
    guard.terminate()
    assert guard.wait(60) == 128 + signal.SIGKILL
    assert all(gone(pid) for pid in pids)


def test_the_group_ends_when_the_parent_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    parent = f"""
import subprocess, sys, time
from posttrain.guard import guarded
subprocess.Popen(guarded([sys.executable, "-c", {STUBBORN!r}, {str(ready)!r}], grace_seconds=0.2)).wait()
"""
    holder = subprocess.Popen([sys.executable, "-c", parent], cwd=Path(__file__).parents[1])
    pids = pids_in(ready, 2)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert all(gone(pid) for pid in pids)


def test_a_command_ends_with_the_make_that_started_it_even_if_that_is_killed(root: Path, tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
from posttrain.guard import end_with_make
end_with_make(60.0)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(120)
"""
    (tmp_path / "wait.py").write_text(script, encoding="utf-8")
    (tmp_path / "Makefile").write_text(f"all:\n\t@exec {sys.executable} wait.py ready\n", encoding="utf-8")
    make = subprocess.Popen(["make"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)})
    (pid,) = pids_in(tmp_path / "ready", 1)
    make.kill()
    make.wait()
    assert gone(pid, 60)


@pytest.mark.parametrize("target", ["ui", "serve", "serve-model", "label", "chat", "up", "demo", "retrain"])
def test_a_command_of_the_makefile_gets_the_signal_that_make_gets(root: Path, tmp_path: Path, target: str) -> None:
    waiting = tmp_path / "python"
    waiting.write_text(f"#!/bin/sh\necho $$ > {tmp_path / 'ready'}\nexec sleep 120\n", encoding="utf-8")
    waiting.chmod(0o755)
    ready = ["--old-file=setup", "--old-file=workspace", f"PYTHON_IN={waiting}"]
    make = subprocess.Popen(["make", *ready, target], cwd=root)
    (pid,) = pids_in(tmp_path / "ready", 1)
    make.terminate()
    make.wait()
    assert gone(pid, 60)

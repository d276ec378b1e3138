"""A fork of the warm process checks its parameters like any other step, and the process is started when it is needed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil

from tests.pipelines.conftest import wait_for
from tests.reliability.workspace import Warm, Workspace


def _is_stopped_in(fork: psutil.Process, folder: Path) -> bool:
    """Other tests use the same server, and their forks may end at any time."""
    try:
        return fork.status() == psutil.STATUS_STOPPED and fork.cwd() == str(folder)
    except psutil.Error:
        return False


def test_parameters_that_change_under_a_fork_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(workspace.folder, folder, ignore=shutil.ignore_patterns(".posttrain", "align"))
    copy = Workspace(folder, workspace.warm)
    process = copy.start("tests.reliability.dying", "metrics 3", "pipelines.reward", SIGNAL="SIGSTOP")
    server = psutil.Process(workspace.warm.pid)
    (stopped,) = wait_for(lambda: [fork for fork in server.children() if _is_stopped_in(fork, folder)])
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("\nreward:\n", "\nreward:\n  # edited\n", 1))
    before, section, rest = params.read_text().partition("\nreward:\n")
    params.write_text(before + section + rest.replace("epochs: 2", "epochs: 3", 1))
    os.kill(stopped.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: reward: reward.epochs changed from 2 to 3 in params.yaml while the stage ran" in err


class Idle(Warm):
    """A server that never answers, and starts at once."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.socket = root, folder / "warm"
        self.process = subprocess.Popen(["sleep", "600"], start_new_session=True)
        self.pid = self.process.pid


def test_a_shared_server_that_its_last_user_has_stopped_is_started_again(root: Path, tmp_path: Path) -> None:
    first = Idle.shared(root, tmp_path / "warm")
    first.leave()
    assert first.process is not None
    assert first.process.returncode == -signal.SIGKILL
    second = Idle.shared(root, tmp_path / "warm")
    try:
        assert psutil.pid_exists(second.pid)
        assert second.pid != first.pid
        assert Idle.shared(root, tmp_path / "warm").pid == second.pid
    finally:
        second.stop()

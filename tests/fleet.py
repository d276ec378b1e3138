"""A flow's clone and workers that share nothing but the network: a git server, an S3 store and a Prefect server on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.network import free_port
from tasks.process import child_environment
from tests.s3 import CREDENTIALS
from tests.workspace import dvc

CLEARED = ("MLFLOW_TRACKING", "PREFECT_", "POSTTRAIN_", "AWS_", "PYTHONPATH", "TMPDIR", "HOME")
POOL = "stages"


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    done = subprocess.run(["git", *identity, *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def git_server(folder: Path) -> Iterator[str]:
    """Return the address of a git server that serves the bare repositories of a folder."""
    port = free_port(0)
    server = subprocess.Popen(
        ["git", "daemon", "--reuseaddr", "--export-all", "--enable=receive-pack", f"--base-path={folder}",
         "--listen=127.0.0.1", f"--port={port}", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        until(lambda: _listens(port), "the git server does not start")
        yield f"git://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], object], words: str, seconds: float = 240.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, words
        time.sleep(0.2)


@dataclass
class Machine:
    """One machine: its own home, temporary folder, leases and clone."""

    home: Path
    prefect: str
    settings: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.home / "project"

    def environment(self, **extra: str) -> dict[str, str]:
        inherited = {k: v for k, v in child_environment().items() if not k.startswith(CLEARED)}
        own = {
            "HOME": str(self.home), "TMPDIR": str(self.home / "tmp"), "POSTTRAIN_LEASES": str(self.home / "leases"),
            "PREFECT_HOME": str(self.home / "prefect"), "PREFECT_API_URL": self.prefect, "CUDA_VISIBLE_DEVICES": "",
            "POSTTRAIN_SLOTS": "1", "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        return inherited | CREDENTIALS | own | self.settings | extra

    def start(self, *command: str, **extra: str) -> subprocess.Popen[bytes]:
        """Start a module here; its output goes to log.txt of the machine."""
        (self.home / "tmp").mkdir(parents=True, exist_ok=True)
        with (self.home / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=self.root, env=self.environment(**extra), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *command: str, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
        (self.home / "tmp").mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.root,
            env=self.environment(**extra),
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def log(self) -> str:
        path = self.home / "log.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@dataclass
class Fleet:
    """The flow's machine, its servers, and the workers that were started."""

    folder: Path
    git: str
    s3: str
    prefect: str
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """All processes of all machines; those that a failed test leaves are stopped."""

    @property
    def parent(self) -> Machine:
        return self.machine("parent", POSTTRAIN_POOL=POOL)

    def machine(self, name: str, **settings: str) -> Machine:
        return Machine(self.folder / name, self.prefect, settings, self.started)

    def publish(self, bucket: str) -> None:
        """Commit the parent's clone with a DVC remote, and push it to the git server."""
        root = self.parent.root
        dvc(root, "remote", "add", "-q", "--force", "--default", "store", f"s3://{bucket}/dvc")
        dvc(root, "remote", "modify", "store", "endpointurl", self.s3)
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", "a commit that workers fetch")
        bare = self.folder / "git" / "project.git"
        git(self.folder, "init", "-q", "--bare", str(bare))
        git(root, "remote", "add", "origin", f"{self.git}/project.git")
        git(root, "push", "-q", "origin", "HEAD:refs/heads/main")

    def add(self, name: str, **settings: str) -> Machine:
        """Start a worker in its own clone."""
        machine = self.machine(name, **settings)
        self.clone(machine)
        self.workers[name] = machine.start("flows.workers", "add", POOL, "--name", name)
        return machine

    def clone(self, machine: Machine) -> None:
        """Clone the project on the machine, unless it is there."""
        machine.home.mkdir(parents=True, exist_ok=True)
        if not machine.root.exists():
            git(machine.home, "clone", "-q", f"{self.git}/project.git", "--branch", "main", str(machine.root))

    def kill(self, name: str) -> None:
        """Kill a worker as a machine that loses its power does."""
        os.killpg(self.workers[name].pid, signal.SIGKILL)
        self.workers.pop(name).wait()

    def stop(self) -> None:
        for process in self.started:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.started:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def fleet(folder: Path, s3: str, prefect: str) -> Iterator[Fleet]:
    """Return a fleet without workers; the parent's clone is to be put at `fleet.parent.root`."""
    (folder / "git").mkdir(parents=True)
    with git_server(folder / "git") as address:
        made = Fleet(folder, address, s3, prefect)
        try:
            yield made
        finally:
            made.stop()


PACKAGES = ("infra", "flows", "tasks", "pipelines", "posttrain")


@contextmanager
def small_fleet(folder: Path, s3: str, prefect: str, template: Path, root: Path, **changes: str) -> Iterator[Fleet]:
    """Return a fleet whose flow has the small workspace, committed and pushed.

    Args:
        template: the small workspace, of which nothing has run.
        root: of the project, whose packages are copied.
        changes: `work` is put into work.py before a stage's inputs are read; others are values in infra/workers.yaml.
    """
    with fleet(folder, s3, prefect) as made:
        parent = made.parent
        parent.home.mkdir(parents=True)
        shutil.copytree(template, parent.root, symlinks=True)
        for name in PACKAGES:
            shutil.copytree(root / name, parent.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        work = parent.root / "work.py"
        added = changes.pop("work", None)
        if added is not None:
            work.write_text(work.read_text().replace("total = ", f"{added}\ntotal = ", 1))
        _set_values(parent.root / "infra" / "workers.yaml", {"lease_seconds": "20"} | changes)
        (parent.root / "params.yaml").write_text("{}\n")
        with (parent.root / ".gitignore").open("a") as file:
            file.write(".posttrain/\n__pycache__/\ntimes.jsonl\n")
        (parent.root / ".dvcignore").write_text("__pycache__\n")
        made.publish("store")
        yield made


def _set_values(path: Path, values: dict[str, str]) -> None:
    lines = path.read_text().splitlines()
    for name, value in values.items():
        (line,) = (line for line in lines if line.startswith(f"{name}:"))
        lines[lines.index(line)] = f"{name}: {value}"
    path.write_text("\n".join(lines) + "\n")

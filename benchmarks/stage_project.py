"""A committed project of trivial stages with this checkout's code, for measurements of workers; and the processes around it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.process import child_environment

PROJECT = Path(__file__).parents[1]
POOL = "stages"
KEYS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_DEFAULT_REGION": "us-east-1"}
BURN = "import sys, time\nwhile time.process_time() < float(sys.argv[1]): pass\nopen(sys.argv[2], 'w').write('x')\n"


def project(folder: Path, stages: list[str]) -> Path:
    """Create a committed project of stages with this checkout's code and settings of workers."""
    folder.mkdir(parents=True)
    (folder / "in").write_text("x")
    (folder / "params.yaml").write_text("turn: 0\n")
    (folder / "burn.py").write_text(BURN)
    (folder / "dvc.yaml").write_text("\n".join(["stages:", *stages]) + "\n")
    for name in ("flows", "tasks", "pipelines", "posttrain", "infra"):
        subprocess.run(["cp", "-r", str(PROJECT / name), str(folder / name)], check=True)
    git(folder, "init", "-q")
    run(folder, "dvc", "init", "-q")
    (folder / ".gitignore").write_text(".posttrain/\n__pycache__/\nout-*\n")
    (folder / ".dvcignore").write_text("__pycache__\n")
    return folder


def publish(root: Path, remote: str, endpoint: str | None, bare: Path, address: str) -> None:
    """Commit the project with its DVC remote, and push it to a bare repository."""
    run(root, "dvc", "remote", "add", "-q", "--default", "store", remote)
    if endpoint:
        run(root, "dvc", "remote", "modify", "store", "endpointurl", endpoint)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "benchmark")
    git(root, "init", "-q", "--bare", str(bare))
    git(root, "remote", "add", "origin", address)
    git(root, "push", "-q", str(bare), "HEAD:refs/heads/main")


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def run(folder: Path, *command: str, **extra: str) -> str:
    environment = child_environment({**KEYS, "CUDA_VISIBLE_DEVICES": "", **extra})
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


@contextmanager
def background(folder: Path, command: list[str], **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process while inside; its output goes to a file next to its folder."""
    with folder.with_name(f"{folder.name}-{Path(command[0]).name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=child_environment({**KEYS, **extra}),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def processor(pid: int) -> float:
    """Return the processor seconds of a process and of its ended children; other work on the machine hardly changes them."""
    path = Path(f"/proc/{pid}/stat")
    fields = path.read_text(encoding="utf-8").rpartition(")")[2].split() if path.exists() else []
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") if fields else 0.0

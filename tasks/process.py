"""Run a command under a guard: read its output in chunks, and stop it without leaving a process behind."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import IO

from posttrain.guard import guarded

POLL_SECONDS = 0.1


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a child process.

    It is this process's environment with its own interpreter first on PATH, so that `python` is the same everywhere. dvc runs a stage in
    the user's shell; SHELL names the shell that every system has.
    """
    here = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    first = path if path.split(os.pathsep)[0] == here else here + os.pathsep + path
    inherited = {name: value for name, value in os.environ.items() if name != "BASH_ENV"}
    return {**inherited, "PATH": first, "SHELL": "/bin/sh", "PYTHONUNBUFFERED": "1", **(extra or {})}


def start(
    command: list[str],
    root: Path,
    *,
    extra: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    output: int | IO[bytes] = subprocess.PIPE,
    pass_fds: tuple[int, ...] = (),
    grace_seconds: float = 20.0,
) -> subprocess.Popen[bytes]:
    """Start `command` in `root` under a guard that dies with the calling thread and ends the command's process group."""
    return subprocess.Popen(
        guarded(command, grace_seconds),
        cwd=root,
        env=child_environment(extra),
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=pass_fds,
        start_new_session=True,
    )


def chunks(process: subprocess.Popen[bytes], stop: Event) -> Iterator[bytes]:
    """Yield the process's output until it ends. If `stop` is set, ask the process once to stop."""
    assert process.stdout is not None
    descriptor, asked = process.stdout.fileno(), False
    while True:
        if stop.is_set() and not asked:
            process.terminate()
            asked = True
        if select.select([descriptor], [], [], POLL_SECONDS)[0]:
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return
            yield chunk
        elif process.poll() is not None:
            return


def end(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Wait, then terminate, then kill. Returns the exit status."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()

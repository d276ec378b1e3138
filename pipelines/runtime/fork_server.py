"""A process that has imported torch and transformers and forks itself for each step, so that a flow pays for the imports once.

    python -m pipelines.runtime.fork_server SOCKET

A step that finds POSTTRAIN_WARM=SOCKET in its environment hands over its arguments, environment, folder and standard streams, and
waits for the fork's exit status. Signals are passed on; a step that is killed takes its fork with it. Only third-party modules are
imported ahead: a step always runs the project's code as it is on disk. Not for GPUs, whose driver does not survive a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

VARIABLE = "POSTTRAIN_WARM"
AHEAD = (
    "torch",
    "transformers",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.auto.modeling_auto",
    "accelerate",
    "pydantic",
    "ruamel.yaml",
    # pyarrow reads a table with its data sets, which bring pandas along
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "tqdm",
)
STREAMS = (0, 1, 2)


def serve(path: Path) -> None:
    """Import what steps need, then fork for every connection until the process is told to end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        # steps may already knock while the imports go on: waiting for them is no slower than importing
        server.bind(str(path))
        server.listen()
        for name in AHEAD:
            importlib.import_module(name)
        signal.signal(signal.SIGCHLD, _reap)
        while True:
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    server.close()
                    _become_step(connection)


def run_warm(module: str, arguments: list[str]) -> int | None:
    """Run the step `module` in a fork of the warm process; its exit status, or None where no warm process answers."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
        request = {"module": module, "arguments": arguments, "environment": environment, "folder": os.getcwd()}
        try:
            connection.connect(path)
            socket.send_fds(connection, [b"+"], STREAMS)
            connection.sendall(json.dumps(request).encode() + b"\n")
            answers = connection.makefile("r", encoding="utf-8")
            pid = int(answers.readline() or 0)
        except OSError:
            return None  # gone: the step imports for itself
        if not pid:
            return None
        with answers:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda received, _: _pass_on(pid, received))
            return int(answers.readline() or 1)


def _become_step(connection: socket.socket) -> None:
    """The fork: take over the caller's streams, folder, environment and arguments, and run the module as `python -m` would."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, descriptors, _, _ = socket.recv_fds(connection, 1, len(STREAMS))
        lines = connection.makefile("r", encoding="utf-8")
        request = json.loads(lines.readline())
        for descriptor, stream in zip(descriptors, STREAMS, strict=True):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.path[0] = request["folder"]
        sys.argv = [request["module"], *request["arguments"]]
        connection.sendall(f"{os.getpid()}\n".encode())
        threading.Thread(target=_die_with_caller, args=(lines,), daemon=True).start()
        status = _run(request["module"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            connection.sendall(f"{status}\n".encode())
        os._exit(status)


def _run(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _die_with_caller(lines: object) -> None:
    """The caller never writes again, so a read returns when it is gone."""
    assert hasattr(lines, "readline")
    lines.readline()
    os.kill(os.getpid(), signal.SIGKILL)


def _pass_on(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _reap(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

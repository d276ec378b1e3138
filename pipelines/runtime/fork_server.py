"""Fork server: a process that has imported torch and transformers, and forks for each step, so that a flow imports them once.

    python -m pipelines.runtime.fork_server SOCKET [MODULE...]

If POSTTRAIN_WARM=SOCKET is set, a step sends its arguments, environment, working directory and standard streams to the server, and
waits for the fork's exit status. It forwards signals, and the fork dies with the step. The server imports only third-party modules
in advance, so a step always runs the project's code as it is on disk; MODULE names more of them. Do not use it with GPUs: a CUDA driver
does not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "POSTTRAIN_WARM"
AHEAD = (
    "torch",
    "transformers",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "accelerate",
    # `import pydantic` leaves its classes for the first use
    "pydantic.main",
    "ruamel.yaml",
    # pyarrow.parquet imports pyarrow.dataset, which imports pandas
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "tqdm",
)
"""Modules that the server imports before the first fork."""
STREAMS = (0, 1, 2)
"""File descriptors of standard input, output and error."""


def serve(path: Path, more: Sequence[str] = ()) -> None:
    """Import the modules that steps need and `more`, then fork for every connection until the process is stopped."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        # Listen before the imports: a step that connects early waits here, which takes no longer than importing itself.
        server.bind(str(path))
        server.listen()
        for name in (*AHEAD, *more):
            importlib.import_module(name)
        gc.freeze()  # A collection in a fork would write to the objects that it shares with the server, and so copy their pages.
        forks: dict[int, socket.socket] = {}
        ended: dict[int, int] = {}
        signal.signal(signal.SIGCHLD, lambda *_: _reap(forks, ended))
        while True:
            connection, _ = server.accept()
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (server, *forks.values()):
                    other.close()
                _become_step(connection)
            forks[pid] = connection
            _report_killed(forks, ended)  # it may have ended before the line above


def run_in_fork_server(module: str, arguments: list[str]) -> int | None:
    """Run the step `module` in a fork of the server and return its exit status, or None if no server answers."""
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
            return None  # The server is gone: the step imports the modules itself.
        if not pid:
            return None
        with answers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                    signal.signal(number, lambda received, _: _pass_on(pid, received))
            status = int(answers.readline() or 1)
            from pipelines.runtime.process import killed_by  # not above: the server must not hold the project's code

            if words := killed_by(status):
                print(f"error: {module} was ended by {words}. Run again: a training step continues.", file=sys.stderr)
            return status


def _open_streams() -> None:
    """Open standard output and error anew: the server's own objects remember the kind of its files, such as a log that can seek."""
    sys.stdout = os.fdopen(1, "w", encoding=sys.stdout.encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors, closefd=False)


def _become_step(connection: socket.socket) -> None:
    """Take over the caller's streams, directory, environment and arguments, and run the module as `python -m` does. Runs in the fork."""
    status = 1
    try:
        _, descriptors, _, _ = socket.recv_fds(connection, 1, len(STREAMS))
        lines = connection.makefile("r", encoding="utf-8")
        request = json.loads(lines.readline())
        for descriptor, stream in zip(descriptors, STREAMS, strict=True):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        _open_streams()
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.path[0] = request["folder"]
        for name in [name for name in sys.modules if name.partition(".")[0] == "pipelines"]:
            del sys.modules[name]  # this module's own package may belong to a different checkout
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
    """Run the module as `__main__` and return its exit status."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _die_with_caller(lines: object) -> None:
    """Kill this process when the caller is gone: the caller never writes again, so the read returns only at its end."""
    assert hasattr(lines, "readline")
    lines.readline()
    os.kill(os.getpid(), signal.SIGKILL)


def _pass_on(pid: int, number: int) -> None:
    """Forward a signal to the fork; a fork that has already exited is ignored."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _reap(forks: dict[int, socket.socket], ended: dict[int, int]) -> None:
    """Collect finished forks, so that none stays as a zombie."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    _report_killed(forks, ended)


def _report_killed(forks: dict[int, socket.socket], ended: dict[int, int]) -> None:
    """Report to the callers of finished forks which signal ended them; other forks have reported their status themselves."""
    for pid in list(ended):
        connection = forks.pop(pid, None)
        if connection is None:
            continue
        status = ended.pop(pid)
        with connection, contextlib.suppress(OSError):
            if os.WIFSIGNALED(status):
                connection.sendall(f"{128 + os.WTERMSIG(status)}\n".encode())


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2:])

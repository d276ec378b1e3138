"""Fork server: a process that has imported torch and transformers, and forks for each step, so that a flow imports them once.

    python -m pipelines.runtime.fork_server SOCKET [MODULE...]

If POSTTRAIN_WARM=SOCKET is set, a step sends its arguments, environment, working directory and standard streams to the server, and
waits for the fork's exit status. It forwards signals, and the fork dies with the step. The server also imports the project's modules that
most steps need. A fork drops them if one of their files has changed since, so a step always runs the project's code as it is on disk.
MODULE names more third-party modules. Do not use it with GPUs: a CUDA driver does not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.runtime.garbage import collect_as_usual

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
STEPS = (
    "pipelines.runtime.step",
    "pipelines.training.best_checkpoint",
    "pipelines.training.evaluator",
    "pipelines.training.on_policy",
    "pipelines.training.preference",
    "pipelines.training.reward_sources",
    "pipelines.training.sample_tables",
    "posttrain.evaluation.answers",
    "posttrain.rollouts.native",
    "posttrain.training.faults",
    "posttrain.training.loop",
    "posttrain.training.supervised",
)
"""Modules of the project that import nearly all others that a step with a model needs."""
IF_IDLE = ("scipy.stats", "great_expectations", "matplotlib.backends.backend_agg", "matplotlib.pyplot")
"""Modules of `validate` and `compare`, which a flow runs once: the server imports them only while no step has come yet."""
PACKAGES = ("pipelines", "posttrain")
Stamps = Mapping[str, tuple[int, ...]]
"""Time of change, size and inode of a source file, by its path."""
STREAMS = (0, 1, 2)
"""File descriptors of standard input, output and error."""


def serve(path: Path, more: Sequence[str] = ()) -> None:
    """Import the modules that steps need and `more`, then fork for every connection until the process is stopped."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        # Listen before the imports: a step that connects early waits here, which takes no longer than importing itself.
        server.bind(str(path))
        server.listen()
        gc.disable()
        for name in (*AHEAD, *more):
            importlib.import_module(name)
        stamps = _import_project()
        _import_if_idle(server)
        gc.freeze()  # A collection in a fork would write to the objects that it shares with the server, and so copy their pages.
        gc.enable()
        collect_as_usual()
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
                _become_step(connection, stamps)
            forks[pid] = connection
            _report_killed(forks, ended)  # it may have ended before the line above


def _import_project() -> Stamps:
    """Import the project's modules for steps, and return the stamps of their files from before the import."""
    try:
        folders = [folder for name in PACKAGES for folder in importlib.import_module(name).__path__]
        before = {str(file): _stamp(file) for folder in folders for file in Path(folder).rglob("*.py")}
        for name in STEPS:
            importlib.import_module(name)
    except Exception as error:  # such as a syntax error in an edit: a step that needs the module stops with it
        print(
            f"fork server: steps import the project by themselves ({type(error).__name__}: {error})",
            file=sys.stderr,
            flush=True,
        )
        _drop_project()
        return {}
    return {file: before.get(file, ()) for file in map(_source, _project_modules()) if file}


def _import_if_idle(server: socket.socket) -> None:
    """Import the modules of stages that a flow runs once, as long as no step waits."""
    for name in IF_IDLE:
        if select.select([server], [], [], 0)[0]:
            return
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _stamp(file: str | Path) -> tuple[int, ...]:
    """Return a file's time of change, size and inode; nothing if it does not exist."""
    try:
        found = os.stat(file)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _project_modules() -> Iterator[str]:
    """Yield the names of the project's imported modules."""
    return (name for name in list(sys.modules) if name.partition(".")[0] in PACKAGES)


def _source(name: str) -> str | None:
    """Return the source file of an imported module."""
    return getattr(sys.modules[name], "__file__", None)


def _drop_project() -> None:
    """Forget the project's modules, so that they are imported from the present folder as they are on disk."""
    for name in list(_project_modules()):
        del sys.modules[name]


def _is_current(stamps: Stamps) -> bool:
    """Return True if a fresh import would read the same files as the server's."""
    importlib.invalidate_caches()
    same = bool(stamps) and all(_stamp(file) == stamp for file, stamp in stamps.items() if file)
    return same and all(_origin(name) == _source(name) for name in PACKAGES)


def _origin(name: str) -> str | None:
    """Return the file from which a fresh import would take an imported package."""
    module: Any = sys.modules.pop(name)
    try:
        found = importlib.util.find_spec(name)
    finally:
        sys.modules[name] = module
    return found.origin if found is not None else None


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


def _become_step(connection: socket.socket, stamps: Stamps) -> None:
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
        # the test of dvc.yaml's dependencies lists the modules that a step imports by itself
        if "POSTTRAIN_TRACE" in os.environ or not _is_current(stamps):
            _drop_project()
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

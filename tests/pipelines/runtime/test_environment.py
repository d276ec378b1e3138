"""Every command sets these variables before its tools are imported."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from urllib.error import URLError
from urllib.request import build_opener

import pytest

from pipelines.runtime import environment
from pipelines.runtime.command_line import report_machine_fault
from pipelines.runtime.process import stopping_signals
from posttrain.errors import OrchestrationError
from posttrain.files import named_in_errors
from tests.webhook import listening

ADVICE = "Free space, or give this user the right to read and write there"


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space") as caught,
        named_in_errors(tmp_path / "a.json"),
        open("/dev/full", "wb", 0) as full,
    ):
        full.write(b"x")
    assert environment.machine_fault(caught.value) == f"No space left on device: {tmp_path}/a.json. {ADVICE}"


def test_a_full_disk_without_a_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    assert environment.machine_fault(full) == f"No space left on device: {tmp_path}. {ADVICE}"
    monkeypatch.setenv("TMPDIR", "/proc")  # a file system without free space
    assert environment.machine_fault(full) == f"No space left on device: /proc. {ADVICE}"
    assert environment.machine_fault(OSError(errno.EPIPE, "Broken pipe")) is None


def test_a_bug_is_no_fault_of_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_machine_fault(PermissionError(errno.EACCES, "Permission denied", "/x/y")) == 2
    assert capsys.readouterr().err.startswith("error: Permission denied: /x/y. Free space, or give this user the right")
    with pytest.raises(BrokenPipeError):
        report_machine_fault(BrokenPipeError(errno.EPIPE, "Broken pipe"))


def test_a_limit_of_open_files_is_named_with_the_command_that_raises_it(capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
        with pytest.raises(OSError, match="Too many open files") as caught:
            _ = [stack.enter_context(open("/dev/null", "rb")) for _ in range(20)]
    assert report_machine_fault(caught.value) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: Too many open files: /dev/null. Raise this process's limit of open files")
    assert printed.endswith("e.g. `ulimit -n 4096`, then run again.\n")


@pytest.mark.parametrize(
    "error", [BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), RuntimeError("can't start new thread")]
)
def test_a_limit_of_processes_is_named(error: OSError | RuntimeError) -> None:
    words = environment.machine_fault(error)
    assert words is not None
    assert words.startswith(f"{error.args[-1]}. End other processes of this user, or raise the limit of processes")
    assert environment.machine_fault(RuntimeError("a bug")) is None


def test_too_few_threads_are_refused_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = environment.THREADS + 2 * (os.cpu_count() or 1)
    before, start, started = threading.active_count(), threading.Thread.start, []

    def start_all_but_the_last(thread: threading.Thread) -> None:
        if len(started) == limit:
            raise RuntimeError("can't start new thread")
        start(thread)
        started.append(thread)

    monkeypatch.setattr(threading.Thread, "start", start_all_but_the_last)
    limit = wanted - 1
    with pytest.raises(RuntimeError, match="can't start new thread"):
        environment.require_threads()
    assert (len(started), threading.active_count()) == (wanted - 1, before)
    started.clear()
    limit = wanted
    environment.require_threads()
    assert (len(started), threading.active_count()) == (wanted, before)


def test_a_panic_of_a_rust_library_is_named() -> None:
    class PanicException(BaseException):
        """As pyo3 raises it."""

    panic = PanicException('ThreadPoolBuildError { kind: IOError(Os { code: 11, kind: WouldBlock, message: "..." }) }')
    words = environment.panic_fault(panic)
    assert words is not None
    assert words.startswith("Resource temporarily unavailable. End other processes of this user, or raise the limit")
    assert environment.panic_fault(PanicException("index out of bounds")) is None
    assert environment.panic_fault(RuntimeError("Os { code: 11 }")) is None


def test_a_process_that_nohup_started_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        assert [number.name for number in stopping_signals()] == ["SIGTERM", "SIGINT", "SIGHUP"]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
        assert [number.name for number in stopping_signals()] == ["SIGTERM", "SIGINT"]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("mine", [None, "intranet,.example.com"])
def test_servers_of_our_own_are_reached_past_a_proxy(monkeypatch: pytest.MonkeyPatch, mine: str | None) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, mine or "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with listening() as (url, told):
        with pytest.raises(URLError):
            build_opener().open(url, b"{}", timeout=10)
        environment.quiet()
        environment.quiet()
        build_opener().open(url, b"{}", timeout=10).close()
    assert told == [{}]
    expected = ["127.0.0.1", "localhost"]
    assert os.environ["no_proxy"].split(",") == [*(mine.split(",") if mine else ()), *expected]


def test_without_a_proxy_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    environment.quiet()
    assert "no_proxy" not in os.environ


def test_a_name_that_the_terminal_cannot_show_ends_no_command(root: Path) -> None:
    program = "from pipelines.runtime import environment; environment.quiet(); print('gr\\u00f6\\u00dfe \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"gr\\xf6\\xdfe \\udcff\n"), done.stderr


def test_code_of_a_different_folder_records_nothing(root: Path, tmp_path: Path) -> None:
    environment.require_own_code(root)
    environment.require_own_code(tmp_path)  # a workspace without its own code, as that of a study
    (tmp_path / "pipelines").mkdir()
    with pytest.raises(OrchestrationError, match="results would be recorded for code that did not make them"):
        environment.require_own_code(tmp_path)
    (tmp_path / "pipelines").rmdir()
    (tmp_path / "pipelines").symlink_to(root / "pipelines")
    environment.require_own_code(tmp_path)


def test_a_fork_of_a_server_that_logs_to_a_file_may_write_to_a_pipe(tmp_path: Path) -> None:
    """Streams that were made for a file would ask the pipe for its position."""
    script = (
        "import os, sys; from pipelines.runtime import environment, fork_server; print('log', flush=True)\n"
        "descriptor, name = os.pipe()[1], 'gr\\xf6\\xdfe'; os.dup2(descriptor, 1); fork_server._open_streams(); environment.quiet()\n"
        "print(name, flush=True); print(sys.stdout.errors, file=sys.stderr)"
    )
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    with (tmp_path / "warm.log").open("wb") as log:
        done = subprocess.run([sys.executable, "-c", script], stdout=log, stderr=subprocess.PIPE, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "backslashreplace\n")
    assert (tmp_path / "warm.log").read_text() == "log\n"

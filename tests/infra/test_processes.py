"""Processes that outlive their command are found again, whatever the clock does, and a reader may go away."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.processes import Processes, Service, birth
from pipelines.runtime.listening import listens
from posttrain.errors import OrchestrationError
from tasks.process import end, start

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


@pytest.fixture
def stranger() -> Iterator[int]:
    """Yield a port on which a different process than the service's listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_a_port_that_a_different_process_has_is_named_before_anything_starts(tmp_path: Path, stranger: int) -> None:
    """Act as the second clone on a machine, which starts servers on the same four ports."""
    processes = Processes(tmp_path, tmp_path)
    with pytest.raises(OrchestrationError, match=rf"port {stranger} .*POSTTRAIN_PORTS=15440"):
        processes.start(Service("sleeper", SLEEP, {}, lambda: True, port=stranger))
    assert processes.pid("sleeper") is None


def test_a_stranger_who_answers_on_the_port_of_a_server_is_not_taken_for_it(tmp_path: Path, stranger: int) -> None:
    """Commands would send it the server's password."""
    processes = Processes(tmp_path, tmp_path)
    processes.start(Service("mute", SLEEP, {}, lambda: True))
    mute = Service("mute", SLEEP, {}, lambda: True, start_seconds=0.3, port=stranger)
    with pytest.raises(OrchestrationError, match="mute did not start"):
        processes.wait(mute)
    assert processes.stop("mute")


def test_a_server_below_a_guard_is_found_on_its_port(tmp_path: Path) -> None:
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    with start([sys.executable, "-c", code], tmp_path, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert listens(process.pid, port)
        assert not listens(process.pid, port + 1)
        end(process, 0)
    assert not listens(process.pid, port)


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

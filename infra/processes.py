"""Run processes that outlive the command that started them, each with a pid file and a log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.runtime.listening import listens
from posttrain.errors import OrchestrationError
from posttrain.network import free_port


@dataclass(frozen=True)
class Service:
    """One process of the topology. `healthy` returns True if it responds; `port` is the one on which it listens, 0 without one."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    healthy: Callable[[], bool]
    start_seconds: float = 300.0
    user: str | None = None
    port: int = 0


class Processes:
    """Pid files and logs in one folder. If a pid now belongs to a different process, the service counts as ended."""

    def __init__(self, home: Path, cwd: Path) -> None:
        self.home, self.cwd = home, cwd

    def start(self, service: Service) -> None:
        """Start the service unless it is running. Raises OrchestrationError if a different process has its port."""
        if self.pid(service.name) is not None:
            return
        _require_free(service)
        self.home.mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o700)  # logs and pid files of this user's servers
        with self.log(service.name).open("ab") as log:
            process = subprocess.Popen(
                service.command,
                cwd="/" if service.user else self.cwd,
                env=dict(service.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=service.user,
                group=service.user,
                extra_groups=[] if service.user else None,
            )
        self._pid_file(service.name).write_text(f"{process.pid} {birth(process.pid)}\n", encoding="utf-8")

    def wait(self, service: Service) -> None:
        """Wait until the service itself responds. Raises OrchestrationError with the end of its log if it does not."""
        deadline = time.monotonic() + service.start_seconds
        while not (service.healthy() and self._has_port(service)):
            if self.pid(service.name) is None or time.monotonic() > deadline:
                raise OrchestrationError(
                    f"{service.name} did not start; the end of {self.log(service.name)}:\n{self.tail(service.name)}"
                )
            time.sleep(0.2)

    def pid(self, name: str) -> int | None:
        """Return the pid of the running process, or None."""
        path = self._pid_file(name)
        if not path.is_file():
            return None
        try:
            pid, born = path.read_text(encoding="utf-8").split()
            same = birth(int(pid)) == born and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ValueError):  # The process has ended, or its pid file is incomplete.
            return None
        return int(pid) if same else None

    def stop(self, name: str, number: int = signal.SIGTERM, seconds: float = 40.0) -> bool:
        """Ask the process to stop, then kill it with all its children; return False if it was not running."""
        pid = self.pid(name)
        if pid is None:
            return False
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
        _, left = psutil.wait_procs(family, timeout=seconds)
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        _reap(pid)
        self._pid_file(name).unlink(missing_ok=True)
        return True

    def log(self, name: str) -> Path:
        """Return the path of the service's log."""
        return self.home / f"{name}.log"

    def tail(self, name: str, lines: int = 15) -> str:
        """Return the last lines of the service's log."""
        path = self.log(name)
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _has_port(self, service: Service) -> bool:
        """Return True if the service's own process listens on its port: a stranger who answers there must not get a password."""
        pid = self.pid(service.name)
        return pid is not None and (not service.port or listens(pid, service.port))

    def _pid_file(self, name: str) -> Path:
        """Return the path of the service's pid file."""
        return self.home / f"{name}.pid"


def birth(pid: int) -> str:
    """Return a text that differs between processes with the same pid. A step of the clock does not change it.

    Raises psutil.NoSuchProcess if there is no such process.
    """
    boot, stat = Path("/proc/sys/kernel/random/boot_id"), Path(f"/proc/{pid}/stat")
    if not boot.is_file():  # not Linux
        return f"{psutil.Process(pid).create_time():.0f}"
    try:
        ticks = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return f"{boot.read_text(encoding='utf-8').strip()}/{ticks}"


def _require_free(service: Service) -> None:
    """Raise OrchestrationError if a process listens on the service's port."""
    try:
        free_port(service.port)
    except OSError as error:
        raise OrchestrationError(
            f"{service.name} cannot start: port {service.port} on 127.0.0.1: {error.strerror}. `ss -ltnp` shows the process that has it."
            " If it is a server of a second clone, give this one its own four ports, e.g. POSTTRAIN_PORTS=15440 for each of its commands."
        ) from None


def _reap(pid: int) -> None:
    """Collect the exit status if the process is a child of this one (start and stop in one command)."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)

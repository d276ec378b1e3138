"""Signal handling, parent-death detection and file locks of one process."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from posttrain.errors import Interrupted

GRACE_SECONDS = 20.0
"""Time between SIGTERM and SIGKILL after an ancestor has died."""
STAGE = "DVC_STAGE"
"""Variable that dvc sets to the stage's name in the environment of everything that the stage runs."""


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a command to stop: from an orchestrator, by Ctrl-C, and from a terminal that is closed."""


def stopping_signals() -> list[signal.Signals]:
    """Return the signals to handle. SIGHUP is left out if it is ignored: then `nohup` has started this process, to outlive a terminal."""
    return [each for each in STOPPING if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def up_to_dvc() -> Iterator[int]:
    """Yield the process ids from the parent up to the dvc process that runs this stage.

    A shell may stay between dvc and the step (dash does), and outlives a killed dvc. Raises ProcessLookupError if dvc has already ended.
    In a container dvc may be process 1; its stages then share its process group.
    """
    for process in psutil.Process().parents():
        if process.pid == 1 and os.getpgid(1) != os.getpgrp():
            raise ProcessLookupError("dvc has ended, and init has adopted this process")
        yield process.pid
        if _stage(process) != os.environ[STAGE]:
            return


def _stage(process: psutil.Process) -> str | None:
    """Return the stage that a process runs, or None if its environment cannot be read."""
    try:
        environ: dict[str, str] = process.environ()
    except psutil.Error:  # The process belongs to a different user, or has ended.
        return None
    return environ.get(STAGE)


def killed_by(status: int) -> str | None:
    """Return which signal ended a process, in words; None if none did. `status` is negative, or 128 plus the number as in shells."""
    number = -status if status < 0 else status - 128
    if number not in set(signal.Signals):
        return None
    name = signal.Signals(number).name
    return name + (", which the kernel sends when the memory is full" if name == "SIGKILL" else "")


class StopSignals:
    """Treat SIGTERM, SIGINT and SIGHUP as a request to stop.

    A step that calls `requested()` gets the flag and stops at its next safe point. A step that never calls it is interrupted at once, and
    so is any step that gets a second signal.
    """

    def __init__(self) -> None:
        self._stop = False
        self._asked = False

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in stopping_signals():
            signal.signal(number, self._handle)

    def ignore(self) -> None:
        """Ignore further signals while the run is being closed, so that its last records are complete."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    def requested(self) -> bool:
        """Return True if a signal asked to stop. From the first call on, one signal no longer interrupts the step."""
        self._asked = True
        return self._stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Set the flag, or raise Interrupted if nothing polls it."""
        again, self._stop = self._stop, True
        if again or not self._asked:
            raise Interrupted(f"stopped by {signal.Signals(number).name}. Run the same command to continue.")


class Lock:
    """An exclusive file lock that the kernel releases when its process dies, for whatever reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock and return True; return False if a different process holds it and `wait` is False."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Release the lock if this object holds it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Lock:
        self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def held(path: Path) -> bool:
    """Return True if a living process holds the lock."""
    if not path.exists():
        return False
    probe = Lock(path)
    if probe.acquire():
        probe.release()
        return False
    return True

"""Signals, parents and locks of one process."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

import psutil

from posttrain.errors import Interrupted

_PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 20.0
STAGE = "DVC_STAGE"
"""What dvc calls the stage, in the environment of everything that the stage runs."""


def die_with_parent() -> None:
    """Get SIGTERM when the parent dies (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with(pids: Iterable[int]) -> None:
    """Get SIGTERM when the first of these ancestors ends, and SIGKILL after GRACE_SECONDS more (Linux).

    A killed dvc, or launcher, then leaves no trainer behind on the device.
    """
    if not hasattr(os, "pidfd_open"):
        return
    try:
        alive = [os.pidfd_open(pid) for pid in pids]
    except ProcessLookupError:
        alive = []
    except OSError:  # a sandbox that knows no pidfd: as on other systems
        return
    threading.Thread(target=_follow, args=(alive,), daemon=True).start()


def _follow(alive: list[int]) -> None:
    if alive:
        select.select(alive, [], [])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def up_to_dvc() -> Iterator[int]:
    """The parent, and on to the dvc that runs this stage: its shell may stay between the two (dash does), and outlives a killed dvc.

    Raises ProcessLookupError where dvc has ended already. In a container dvc may be process 1, and then its stage is of its group.
    """
    for process in psutil.Process().parents():
        if process.pid == 1 and os.getpgid(1) != os.getpgrp():
            raise ProcessLookupError("dvc is gone, and init has taken its child")
        yield process.pid
        if _stage(process) != os.environ[STAGE]:
            return


def _stage(process: psutil.Process) -> str | None:
    try:
        environ: dict[str, str] = process.environ()
    except psutil.Error:  # of another user, or gone
        return None
    return environ.get(STAGE)


class StopSignals:
    """SIGTERM and SIGINT as a request to stop.

    A step that has asked `requested()` gets the flag and stops at its next safe point. One that never asks, and any
    second signal, is interrupted where it stands.
    """

    def __init__(self) -> None:
        self._stop = False
        self._asked = False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def ignore(self) -> None:
        """From here on the run is being closed; a signal must not tear that."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def requested(self) -> bool:
        self._asked = True
        return self._stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._stop = self._stop, True
        if again or not self._asked:
            raise Interrupted(f"stopped by {signal.Signals(number).name}. The same command continues or starts again.")


class Lock:
    """An exclusive file lock that the kernel releases when its process dies, however it dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self, *, wait: bool = False) -> bool:
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
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Lock:
        self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def held(path: Path) -> bool:
    """Whether a living process holds the lock."""
    if not path.exists():
        return False
    probe = Lock(path)
    if probe.acquire():
        probe.release()
        return False
    return True

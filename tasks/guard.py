"""Runs one command in its own process group and sees it out: python tasks/guard.py PARENT GRACE -- COMMAND...

Told to stop (TERM), or when the process PARENT dies, it sends the group INT, which dvc sits out while its step
writes a checkpoint, then TERM after GRACE seconds, then KILL. It ends when the group is empty, so whoever holds a lock or
a pipe through it knows that nothing is left. Imports only the standard library: it starts in 20 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
TERM_SECONDS = 2.0
PR_SET_PDEATHSIG = 1


def guarded(command: list[str], grace_seconds: float = 20.0) -> list[str]:
    """The command line that runs `command` under a guard bound to this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace_seconds), "--", *command]


def main(arguments: list[str]) -> int:
    parent, grace_seconds, command = int(arguments[0]), float(arguments[1]), arguments[3:]
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    _die_with(parent, signal.SIGTERM)
    me = os.getpid()
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: _prepare_child(me))
    if not _wait(child, None):
        _put_down(child, grace_seconds)
    _signal_group(child.pid, signal.SIGKILL)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _prepare_child(parent: int) -> None:
    # A parent started in the background by a shell has INT ignored, and that would be inherited.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
    _die_with(parent, signal.SIGKILL)


def _die_with(parent: int, number: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(128 + number)


def _wait(child: subprocess.Popen[bytes], seconds: float | None) -> bool:
    """True when the child ended, False when a signal asked to stop or the time is over."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while child.poll() is None:
        left = 3600.0 if deadline is None else deadline - time.monotonic()
        received = signal.sigtimedwait(WATCHED, max(left, 0.0))
        if received is None and deadline is not None:
            return False
        if received is not None and received.si_signo != signal.SIGCHLD:
            return False
    return True


def _put_down(child: subprocess.Popen[bytes], grace_seconds: float) -> None:
    for number, seconds in ((signal.SIGINT, grace_seconds), (signal.SIGTERM, min(TERM_SECONDS, grace_seconds))):
        _signal_group(child.pid, number)
        if _wait(child, seconds):
            return
    _signal_group(child.pid, signal.SIGKILL)
    child.wait()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

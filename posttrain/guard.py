"""End with a different process: a parent, an ancestor, or the process that asked for a command.

Imports only the standard library. Run as a script it is the guard of one command and starts in 20 ms:

    python guard.py PARENT GRACE -- COMMAND...     COMMAND in its own process group; see `guarded`
    python guard.py --group PARENT SCRATCH -- COMMAND...   COMMAND in the guard's own group; see `guarded_group`
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import NoReturn

WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
TERM_SECONDS, POLL_SECONDS, GROUP_GRACE_SECONDS = 2.0, 0.2, 10.0
MAKES = ("make", "gmake")
_PR_SET_PDEATHSIG = 1


def signal_at_parents_death(number: int = signal.SIGTERM, parent: int | None = None) -> None:
    """Ask the kernel for a signal when the thread that started this process ends (Linux; elsewhere nothing happens).

    With `parent` given, exit at once if that process is not the parent any more.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        sys.exit(128 + number)


def end_with(pids: Iterable[int], grace_seconds: float) -> None:
    """Get SIGTERM when the first of these ancestors ends, and SIGKILL after `grace_seconds` more (Linux).

    A killed dvc, or launcher, then leaves no trainer behind on the device.
    """
    if not hasattr(os, "pidfd_open"):
        return
    try:
        alive = [os.pidfd_open(pid) for pid in pids]
    except ProcessLookupError:
        alive = []
    except OSError:  # A sandbox without pidfd: behave as on other systems.
        return
    threading.Thread(target=_follow, args=(alive, grace_seconds), daemon=True).start()


def end_with_make(grace_seconds: float) -> None:
    """Get SIGTERM when the `make` that started this process ends, even if it was killed; without `make` nothing happens (Linux)."""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/comm", encoding="utf-8") as file:
            name = file.read().strip()
    except OSError:  # not Linux, or the parent has ended
        return
    if name in MAKES:
        end_with([parent], grace_seconds)


def guarded(command: list[str], grace_seconds: float = 20.0) -> list[str]:
    """Return the command line that runs `command` under a guard bound to the calling thread.

    At SIGTERM, or at the thread's end, the guard sends the command's group INT, which dvc sits out while its step writes a checkpoint,
    then TERM after the grace, then KILL. It ends when the group is empty: a lock or pipe that it holds is free only then.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace_seconds), "--", *command]


def guarded_group(command: list[str], scratch: os.PathLike[str] | str = "") -> list[str]:
    """Return the command line that runs `command` in the guard's own process group, which ends as one.

    It is bound to the calling process, not to its thread: TERM for the command, then KILL for the whole group. Start it in a new session.
    If the calling process is killed, the guard also deletes the folder `scratch`.
    """
    return [sys.executable, "-I", "-S", __file__, "--group", str(os.getpid()), os.fspath(scratch), "--", *command]


def main(arguments: list[str]) -> int:
    """Run the guard of one command; return the command's exit status."""
    if arguments[0] == "--group":
        _guard_group(int(arguments[1]), arguments[2], arguments[4:])
    parent, grace_seconds, command = int(arguments[0]), float(arguments[1]), arguments[3:]
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    signal_at_parents_death(signal.SIGTERM, parent)
    me = os.getpid()
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: _prepare_child(me))
    if not _wait(child, None):
        _put_down(child, grace_seconds)
    _signal_group(child.pid, signal.SIGKILL)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _guard_group(parent: int, scratch: str, command: list[str]) -> NoReturn:
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _: received.append(got))
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: signal_at_parents_death(signal.SIGKILL)
    )
    while child.poll() is None and not received and os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + GROUP_GRACE_SECONDS
    if child.poll() is None:
        child.terminate()
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if scratch and os.getppid() != parent:
        import shutil  # here, because it takes as long to import as all the rest of the guard

        shutil.rmtree(scratch, ignore_errors=True)
    # This process leads the group, so it ends here as well.
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _follow(alive: list[int], grace_seconds: float) -> None:
    if alive:
        select.select(alive, [], [])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _prepare_child(parent: int) -> None:
    # A parent started in the background by a shell has INT ignored, and that would be inherited.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
    signal_at_parents_death(signal.SIGKILL, parent)


def _wait(child: subprocess.Popen[bytes], seconds: float | None) -> bool:
    """Return True when the child ended, False when a signal asked to stop or the time is over."""
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

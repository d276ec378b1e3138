"""Run a command in this process group, and kill the whole group with the command, with the parent process, or on a signal.

    python leash.py PARENT_PID COMMAND...

A server starts child processes that outlive it if it is killed. This file runs as a script, so it imports nothing of the project.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import NoReturn

POLL_SECONDS, GRACE_SECONDS = 0.2, 10.0
_PR_SET_PDEATHSIG = 1


def _die_with_leash() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(parent: int, command: list[str]) -> NoReturn:
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _: received.append(got))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_leash)
    while child.poll() is None and not received and os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + GRACE_SECONDS
    if child.poll() is None:
        child.terminate()
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    # this process leads the group, so it ends here too
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

"""Runs a command in this process's own group and ends the whole group with it, with the process that asked for it, or when told to.

    python leash.py PARENT_PID COMMAND...

A server starts processes of its own, which outlive it when it is killed. Run as a script, so it imports nothing of the project.
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
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _: told.append(got))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_leash)
    while child.poll() is None and not told and os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + GRACE_SECONDS
    if child.poll() is None:
        child.terminate()
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    # this process leads the group, so it ends here as well
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

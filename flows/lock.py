"""The lock of a workspace: one flow at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from posttrain.errors import OrchestrationError
from tasks.console import log_line

WAIT_SECONDS = 2.0


class WorkspaceBusy(OrchestrationError):
    """A flow is already running in this workspace."""


def refuse_second_flow(root: Path) -> None:
    """Raise WorkspaceBusy if a flow is running in this workspace."""
    with only_flow(root):
        pass


@contextmanager
def only_flow(root: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold .posttrain/flow.lock.

    If a flow already runs in this workspace, wait for it, or raise WorkspaceBusy with its process id.
    """
    path = root / ".posttrain" / "flow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        logged = False
        while not _locked(file):
            file.seek(0)
            holder = f"a flow is already running in {root.absolute()} (process {file.read().strip() or 'unknown'})"
            if not wait:
                raise WorkspaceBusy(
                    f"{holder}. Wait for it, stop it with Ctrl-C, or use a git worktree with the shared DVC cache."
                )
            if not logged:
                logged = bool(log_line(f"waiting: {holder}"))
            time.sleep(WAIT_SECONDS)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _locked(file: IO[str]) -> bool:
    """Take the lock and return True; return False if it is taken."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

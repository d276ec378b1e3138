"""Copy a running stage's checkpoints to DVC's remote at an interval."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import PosttrainError
from tasks.background import in_background
from tasks.pool import checkpoints

POLL_SECONDS = 0.5


@dataclass
class Copies:
    """The checkpoints of one stage in the remote."""

    tree: Path
    stage: str
    key: str
    """Of the folder in the remote; see tasks.pool.order."""
    seconds: float
    warn: Callable[[str], None]
    """Called with a message if a copy fails: training goes on, and the next copy tries again."""
    newest: str = ""
    """Name of the newest one in the remote."""
    on_copy: Callable[[str], None] = lambda name: None
    """Called with the name of each new one."""

    @contextmanager
    def made(self) -> Iterator[None]:
        """Copy new checkpoints while inside, and the last one if the stage does not finish."""
        try:
            with in_background(self._copy_often):
                yield
        except PosttrainError:
            self.copy()
            raise

    def copy(self) -> bool:
        """Copy the newest checkpoint unless the remote has it; return True if it was copied."""
        found = checkpoints.newest(self.tree, self.stage)
        if found is None or f"{found.step}" == self.newest.partition("-")[0]:
            return False
        try:
            name = checkpoints.upload(self.tree, self.key, found)
        except Exception as error:  # each kind of remote raises its own
            self.warn(f"{self.stage}: checkpoint {found.step} is not in the remote: {error}")
            return False
        if name is None:
            return False
        self.newest = name
        self.on_copy(name)
        return True

    def _copy_often(self, over: threading.Event) -> None:
        copied = time.monotonic()
        while not over.wait(POLL_SECONDS):
            if time.monotonic() - copied >= self.seconds and self.copy():
                copied = time.monotonic()

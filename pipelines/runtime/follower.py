"""Start the child process that copies a running step's journal into MLflow, so that the step never waits for MLflow."""

from __future__ import annotations

import math
import os
import subprocess
import sys

from posttrain.errors import ConfigError

WAIT_SECONDS = 15.0
"""Default time that a step waits, at its end, for the last records to reach MLflow."""


MOST_SECONDS = 86_400


def _wait_seconds() -> float:
    """Return POSTTRAIN_FOLLOWER_SECONDS, or the default. Raises ConfigError if it is no number from 0 to MOST_SECONDS."""
    text = os.environ.get("POSTTRAIN_FOLLOWER_SECONDS", "").strip()
    try:
        seconds = float(text or WAIT_SECONDS)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MOST_SECONDS:
        raise ConfigError(
            f"POSTTRAIN_FOLLOWER_SECONDS = {text[:40]!r}: must be a number of seconds, e.g. 15, up to {MOST_SECONDS}"
        )
    return seconds


class Follower:
    """Run `python -m pipelines.commands.sync --follow` for one run; it catches up and exits when its standard input closes."""

    def __init__(self, process: subprocess.Popen[bytes] | None, wait_seconds: float = WAIT_SECONDS) -> None:
        self._process, self._wait_seconds = process, wait_seconds

    @classmethod
    def start(cls, identity: str) -> Follower:
        """Start a follower, unless POSTTRAIN_FOLLOWER=1 is set, because a different process then follows the run."""
        if os.environ.get("POSTTRAIN_FOLLOWER") == "1":
            return cls(None)
        wait_seconds = _wait_seconds()
        command = [sys.executable, "-m", "pipelines.commands.sync", "--follow", "--run", identity]
        # Its own session: Ctrl-C and a signal to the step's group must not end it before the last catch-up.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        return cls(process, wait_seconds)

    def finish(self) -> None:
        """Wait a limited time for the follower to catch up, then kill it.

        The next step, or `posttrain sync`, copies the remaining records.
        """
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(self._wait_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http://", "https://")):
                # The store is a file of the project: the next step and `make ui` copy the rest, so there is nothing to do.
                return
            print(
                "tracking: MLflow does not have all records yet; `posttrain sync` copies the rest from the journal.",
                file=sys.stderr,
            )

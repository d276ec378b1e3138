"""The child process that carries a running step's journal into MLflow, so that the step itself never waits for it."""

from __future__ import annotations

import os
import subprocess
import sys

WAIT_SECONDS = 15.0


class Follower:
    """`python -m pipelines.sync --follow` for one run. It catches up and ends when its standard input closes."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self._process = process

    @classmethod
    def start(cls, identity: str) -> Follower:
        """Start one, unless the environment says that somebody follows already (POSTTRAIN_FOLLOWER=1)."""
        if os.environ.get("POSTTRAIN_FOLLOWER") == "1":
            return cls(None)
        command = [sys.executable, "-m", "pipelines.sync", "--follow", "--run", identity]
        # Its own session: Ctrl-C and a signal to the step's group must not end it before the last catch-up.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        return cls(process)

    def finish(self) -> None:
        """Let it catch up for a while; the next step or `python -m pipelines.sync` carries over what is left then."""
        if self._process is None:
            return
        wait_seconds = float(os.environ.get("POSTTRAIN_FOLLOWER_SECONDS", WAIT_SECONDS))
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            print(
                "tracking: MLflow is behind; `python -m pipelines.sync` catches up from the journal.", file=sys.stderr
            )

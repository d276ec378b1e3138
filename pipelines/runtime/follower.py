"""The child process that carries a running step's journal into MLflow, so that the step itself never waits for it."""

from __future__ import annotations

import os
import subprocess
import sys

from posttrain.errors import ConfigError

WAIT_SECONDS = 15.0


def _wait_seconds() -> float:
    text = os.environ.get("POSTTRAIN_FOLLOWER_SECONDS", "").strip()
    try:
        return float(text or WAIT_SECONDS)
    except ValueError:
        raise ConfigError(f"POSTTRAIN_FOLLOWER_SECONDS = {text!r}: must be a number of seconds") from None


class Follower:
    """`python -m pipelines.commands.sync --follow` for one run. It catches up and ends when its standard input closes."""

    def __init__(self, process: subprocess.Popen[bytes] | None, wait_seconds: float = WAIT_SECONDS) -> None:
        self._process, self._wait_seconds = process, wait_seconds

    @classmethod
    def start(cls, identity: str) -> Follower:
        """Start one, unless the environment says that somebody follows already (POSTTRAIN_FOLLOWER=1)."""
        if os.environ.get("POSTTRAIN_FOLLOWER") == "1":
            return cls(None)
        wait_seconds = _wait_seconds()
        command = [sys.executable, "-m", "pipelines.commands.sync", "--follow", "--run", identity]
        # Its own session: Ctrl-C and a signal to the step's group must not end it before the last catch-up.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        return cls(process, wait_seconds)

    def finish(self) -> None:
        """Let it catch up for a while; the next step or `python -m pipelines.commands.sync` carries over what is left then."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(self._wait_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            print(
                "tracking: MLflow is behind; `python -m pipelines.commands.sync` catches up from the journal.",
                file=sys.stderr,
            )

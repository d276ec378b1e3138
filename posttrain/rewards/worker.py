"""Run a reward function in a separate process, because a thread that hangs can be neither stopped nor abandoned.

A `Worker` does the same as calling.call. After a time-out its process is killed, and the next call starts a new one. Rows and values
travel as lines of JSON, never as pickles. Anything the function prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Mapping, Sequence
from numbers import Real
from threading import Thread
from typing import Any

from posttrain.errors import ConfigError, RewardError, RewardTimeoutError
from posttrain.guard import signal_at_parents_death
from posttrain.rewards.calling import CallResult, call

START_SECONDS = 600.0
"""Time to import the function's module, which may import a large library: 5 s of processor time took over 120 s on a busy machine."""


class Worker:
    """The function `path` (a built-in's name or package.module:function), in a process that is killed after `seconds` per batch.

    Example:
        >>> worker = Worker("length", seconds=60)
        >>> worker([""], ["abcd"], columns={}, arguments={"target": 6, "tolerance": 4}).values
        [0.5]
        >>> worker.close()
    """

    def __init__(self, path: str, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._ready()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        arguments: Mapping[str, Any],
    ) -> CallResult:
        """Call the function as calling.call does.

        Raises:
            RewardTimeoutError: the time is up.
            RewardError: the process died.
        """
        process = self._ready()
        reply = self._exchange(
            process, [list(prompts), list(completions), dict(columns), dict(arguments)], self.seconds
        )
        failures = {int(row): message for row, message in reply["failures"].items()}
        return CallResult(reply["values"], failures, reply["trace"])

    def close(self) -> None:
        """Kill the process."""
        if self._process is not None:
            _kill(self._process)
            self._process = None

    def _ready(self) -> subprocess.Popen[bytes]:
        """Return the process, started and with the function imported.

        Raises:
            ConfigError: the function cannot be imported.
        """
        if self._process is not None and self._process.poll() is None:
            return self._process
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "posttrain.rewards.worker", self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,
        )
        weakref.finalize(self, _kill, self._process)
        try:
            started = self._exchange(self._process, None, START_SECONDS)
        except RewardError as error:
            raise ConfigError(f"cannot import the reward function {self.path!r}: {error}") from None
        if "error" in started:
            failure = ConfigError(started["error"])
            failure.add_note(started["trace"])
            raise failure
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], request: Any, seconds: float) -> dict[str, Any]:
        """Send one line (none if the request is None) and read one; kill the process if that takes too long or is cut short."""
        lines: list[bytes] = []
        thread = Thread(target=_converse, args=(process, request, lines), daemon=True)
        thread.start()
        try:
            thread.join(seconds)
        except BaseException:
            self.close()
            raise
        if thread.is_alive():
            self.close()
            raise RewardTimeoutError(f"no answer within {seconds:g} seconds")
        if not lines or not lines[0].endswith(b"\n"):
            self.close()
            raise RewardError(f"its process ended, {_ending(process.returncode)}")
        reply: dict[str, Any] = json.loads(lines[0])
        return reply


def _converse(process: subprocess.Popen[bytes], request: Any, lines: list[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if request is not None:
            process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            process.stdin.flush()
        lines.append(process.stdout.readline())
    except (OSError, ValueError):  # the pipe broke or was closed; the caller sees that no line came
        return


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process with all its children, and wait until it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


def serve(path: str) -> None:
    """Run in the worker process: import the function, then answer line by line until the parent closes the pipe."""
    signal_at_parents_death(signal.SIGKILL)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    from posttrain.rewards.functions import find_function

    def reply(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message, default=_plain).encode() + b"\n")
        replies.flush()

    try:
        function = find_function(path)
    except ConfigError as error:
        reply({"error": str(error), "trace": traceback.format_exc()})
        return
    reply({})
    for line in requests:
        result = call(function, *json.loads(line))
        reply({"values": result.values, "failures": result.failures, "trace": result.trace})


def _plain(value: Any) -> Any:
    """Convert numbers of other libraries to float; other values are sent as text, and the parent rejects them."""
    return float(value) if isinstance(value, Real) else repr(value)


if __name__ == "__main__":
    serve(sys.argv[1])

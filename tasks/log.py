"""Read a stage's output: emit whole lines, limit progress updates, and keep the line that explains a failure."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import IO, Literal

from pipelines.runtime.process import killed_by

StageOutcome = Literal["ran", "restored", "up-to-date"]
"""How a stage became up to date."""

PROGRESS_SECONDS = 30.0
MAX_CHARACTERS = 2000

_STEPS = re.compile(r"(\d+)/(\d+) \[[^<\]]*<(\d+:[\d:]+)")
"""tqdm's counter, and its estimate of the time left."""
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LINE = re.compile(rb"([^\r\n]*)(\r\n|\r(?!\n)|\n)")
_ADVICE = re.compile(
    r"To track the changes with git|To enable auto staging|\s*git add |\s*dvc config core\.autostage"
    r"|Use `dvc push`|Updating lock file|Generating lock file|Data and pipelines are up to date"
)
_EXITED = re.compile(r"exited with (-?\d+)$")
_DVC_ERROR = re.compile(r"^ERROR: ")
_OWN_ERROR = re.compile(
    r"\[Errno \d+\]|unexpected error|^failed to reproduce '[^']*': (?!failed to run: |.*exited with -?\d+$)"
)
_TRANSIENT = re.compile(r"is busy, it is being blocked by|Unable to acquire lock|Failed to acquire .*lock")


def progress_words(text: str) -> str | None:
    """Return a progress bar's counter in words, or None if the line has none.

    Example:
        >>> progress_words("align-grpo-0:  25%|##5       | 10/40 [00:12<00:36,  1.20s/step]")
        'step 10 of 40, 00:36 left'
    """
    found = _STEPS.search(text)
    return None if found is None else f"step {found[1]} of {found[2]}, {found[3]} left"


class StageLog:
    """Split raw output into lines, emit them, write everything to `file`, show progress, and track how the stage ended."""

    def __init__(
        self,
        emit: Callable[[str], None],
        file: IO[bytes],
        clock: Callable[[], float] = time.monotonic,
        show: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._emit, self._file, self._clock, self._show = emit, file, clock, show
        self._rest = b""
        self._last_progress = clock()
        self._step_lines: list[str] = []
        self._dvc_errors: list[str] = []
        self.outcome: StageOutcome = "up-to-date"
        self.transient = False

    def feed(self, chunk: bytes) -> None:
        """Process the next bytes of output."""
        self._file.write(chunk)
        self._file.flush()
        data = self._rest + chunk
        # A final \r may be the first half of \r\n.
        held = 1 if data.endswith(b"\r") else 0
        consumed = 0
        for match in _LINE.finditer(data, 0, len(data) - held):
            self._line(match[1], progress=match[2] == b"\r")
            consumed = match.end()
        self._rest = data[consumed:]

    def close(self) -> None:
        """Process an unfinished last line."""
        if self._rest.strip():
            self._line(self._rest, progress=False)
        self._rest = b""

    def last_error(self) -> str:
        """Return the step's last `error:` line, else the signal that ended it, else dvc's own last error, else the step's last line."""
        for line in reversed(self._step_lines):
            if line.casefold().startswith("error:"):
                return line
        found = _EXITED.search(self._dvc_errors[-1]) if self._dvc_errors else None
        words = killed_by(int(found[1])) if found else None
        if words:
            return f"its process was ended by {words}"
        if self._dvc_errors and _OWN_ERROR.search(self._dvc_errors[-1]):  # dvc has failed, e.g. when it wrote dvc.lock
            return self._dvc_errors[-1]
        lines = self._step_lines[-1:] or self._dvc_errors[-1:]
        return lines[0] if lines else "it wrote nothing"

    def dvc_error(self) -> str:
        """Return dvc's last error, else the step's."""
        return self._dvc_errors[-1] if self._dvc_errors else self.last_error()

    def _line(self, raw: bytes, *, progress: bool) -> None:
        """Emit one line, unless it is advice, or progress that comes too soon."""
        text = _ANSI.sub("", raw.decode("utf-8", "replace")).rstrip()[:MAX_CHARACTERS]
        if not text.strip() or _ADVICE.match(text):
            return
        if progress:
            if self._clock() - self._last_progress < PROGRESS_SECONDS:
                return
            self._last_progress = self._clock()
            words = progress_words(text)
            if words:
                self._show(words)
        else:
            self._read(text)
        self._emit(text)

    def _read(self, text: str) -> None:
        """Update outcome and errors from one line."""
        if _TRANSIENT.search(text):
            self.transient = True
        if _DVC_ERROR.match(text):
            self._dvc_errors.append(text.removeprefix("ERROR: "))
        elif self._dvc_errors and text.lstrip().startswith("(PID "):
            self._dvc_errors[-1] += " " + text.strip()
        elif text.startswith(("Running stage ", "Verifying data sources in stage", "Importing ")):
            self.outcome = "ran"
        elif text.startswith("Stage ") and text.endswith("checking out outputs"):
            self.outcome = "restored"
        elif not text.startswith("> "):
            self._step_lines = [*self._step_lines[-49:], text]

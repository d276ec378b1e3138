"""Log served answers on disk and as MLflow traces, in its own thread: no request waits for it, and none fails by it."""

from __future__ import annotations

import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.runtime.journal import Record
from pipelines.runtime.redaction import printable, redact, redacted
from pipelines.serving.models import Served
from pipelines.tracking.served import SHADOW, ServedTraces, append_served
from pipelines.tracking.traces import SERVED
from posttrain.errors import PosttrainError
from posttrain.rollouts.engine import Completion

TOGETHER = 64
"""Most answers that are written at a time."""
MOST_PENDING = 4096
"""Answers that are kept in memory for MLflow while it is down; those beyond are only on disk."""
RETRY_SECONDS = 10.0


@dataclass(frozen=True)
class GivenAnswers:
    """The answers to one prompt.

    Attributes:
        request: id of the request, the same for a shadow's answers to it.
        finish: returns an answer's text and why it ended.
        began: seconds since the epoch.
    """

    request: str
    served: Served
    prompt: Any
    completions: list[Completion]
    finish: Callable[[Completion], tuple[str, str]]
    began: float
    ended: float
    shadow: bool = False

    def records(self) -> list[Record]:
        """Return one record per answer, without credentials."""
        found = []
        for number, completion in enumerate(self.completions):
            text, reason = self.finish(completion)
            found.append({
                "kind": SERVED, "id": f"{self.request}-{number}{f'-{SHADOW}' if self.shadow else ''}", "request": self.request,
                "time": self.began, "seconds": round(self.ended - self.began, 3), "model": self.served.name,
                "version": self.served.version, "md5": self.served.md5, SHADOW: self.shadow, "prompt": redacted(self.prompt),
                "completion": redact(text), "finish_reason": reason, "tokens": len(completion.tokens),
            })  # fmt: skip
        return found


class AnswerLog:
    """Log a share of the requests. `close` writes those that wait."""

    def __init__(self, project: Path, share: float, traces: ServedTraces) -> None:
        self._project, self._share, self._traces = project, share, traces
        self._queue = queue.SimpleQueue[GivenAnswers | None]()
        self._pending: list[Record] = []
        self._next_copy = 0.0
        self._reported: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="answer log", daemon=True)
        self._thread.start()

    def chooses(self) -> bool:
        """Return True for the logged share of the requests."""
        return random.random() < self._share

    def add(self, answers: GivenAnswers) -> None:
        """Log answers soon; returns at once."""
        self._queue.put(answers)

    def close(self) -> None:
        """Write the answers that wait, and end. Those that MLflow has not taken stay on disk for `posttrain sync`."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        more = True
        while more:
            batch, more = self._next_batch()
            self._write(batch)
            self._copy(last=not more)

    def _next_batch(self) -> tuple[list[GivenAnswers], bool]:
        """Return the answers that wait, and False after the last batch. Wait for one if MLflow is up to date."""
        found = list[GivenAnswers]()
        try:
            first = self._queue.get(timeout=RETRY_SECONDS if self._pending else None)
            while first is not None:
                found.append(first)
                if len(found) == TOGETHER:
                    return found, True
                first = self._queue.get_nowait()
        except queue.Empty:
            return found, True
        return found, False

    def _write(self, batch: list[GivenAnswers]) -> None:
        records = [record for answers in batch for record in answers.records()]
        try:
            append_served(self._project, records)
        except (PosttrainError, OSError) as error:
            self._report(f"answers are not logged: {error}")
            return
        self._pending = [*self._pending, *records][:MOST_PENDING]

    def _copy(self, *, last: bool) -> None:
        if not self._pending or (time.monotonic() < self._next_copy and not last):
            return
        try:
            self._traces.add(self._pending)
        except PosttrainError as error:
            self._report(str(error))
            self._next_copy = time.monotonic() + RETRY_SECONDS
            return
        self._pending.clear()

    def _report(self, problem: str) -> None:
        """Print a problem once."""
        if problem not in self._reported:
            self._reported.add(problem)
            print(f"serve: {printable(redact(problem))}", file=sys.stderr, flush=True)

"""Answer concurrent requests in batches: those that wait while one batch is sampled form the next one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from posttrain.api import Model
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine

MAX_ANSWERS = 256
"""Most answers of one batch; the engine limits their memory itself."""


@dataclass
class Job:
    """One prompt with its seeds. `on_token(answer, id)` is called for every drawn token, from the sampling thread."""

    request: Request
    settings: SamplingSettings
    on_token: Callable[[int, int], None] | None = None
    done: Future[list[Completion]] = field(default_factory=Future)


class Batcher:
    """A model and the thread that samples from it. Answers depend on the seeds, and not on the requests in the same batch."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._engine = NativeEngine(model.lm, model.encoder.ends)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """Add a job. Return False if this model is being retired, so that the caller takes the one that followed it."""
        with self._changed:
            if self._closed:
                return False
            self._waiting.append(job)
            self._changed.notify()
            return True

    @property
    def waiting(self) -> int:
        """Return the number of jobs that have not been begun."""
        with self._changed:
            return len(self._waiting)

    def retire(self) -> None:
        """Take no more jobs; those that wait are still answered. Returns at once."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self) -> None:
        """Wait until a retired model has answered its last job."""
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)

    def _next_batch(self) -> list[Job]:
        """Return the jobs with the settings of the one that has waited longest; nothing if there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            settings, batch, others, count = self._waiting[0].settings, list[Job](), deque[Job](), 0
            for job in self._waiting:
                size = len(job.request.seeds)
                if job.settings == settings and (not batch or count + size <= MAX_ANSWERS):
                    batch.append(job)
                    count += size
                else:
                    others.append(job)
            self._waiting = others
            return batch

    def _answer(self, batch: list[Job]) -> None:
        owners = [(job, answer) for job in batch for answer in range(len(job.request.seeds))]

        def on_token(number: int, token: int) -> None:
            job, answer = owners[number]
            if job.on_token is not None:
                job.on_token(answer, token)

        watched = any(job.on_token is not None for job in batch)
        try:
            found = self._engine.sample(
                [job.request for job in batch], batch[0].settings, on_token if watched else None
            )
        except BaseException as error:  # reaches the requests, which report it; the thread goes on with the next batch
            for job in batch:
                job.done.set_exception(error)
            return
        for job, completions in zip(batch, found, strict=True):
            job.done.set_result(completions)

"""Watch a share of the requests: log their answers, and let a shadow model answer them too. The caller never sees a shadow's answer."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pipelines.runtime.redaction import printable, redact
from pipelines.serving.answer_log import AnswerLog, GivenAnswers
from pipelines.serving.batching import Job
from pipelines.serving.models import Served
from posttrain.errors import PosttrainError
from posttrain.rollouts.engine import Completion

MOST_WAITING = 64
"""A shadow with so many waiting prompts leaves out further ones, so that a slow one cannot fill the memory."""
Finish = Callable[[Served, Completion], tuple[str, str]]


class Observer:
    """Handle a request besides answering it. An error here is reported and never reaches the caller."""

    def __init__(self, log: AnswerLog, shadow: Served | None = None, shadow_share: float = 1.0) -> None:
        self._log, self.shadow, self._share = log, shadow, shadow_share
        self.left_out = 0
        """Prompts that the shadow left out because it was behind."""

    def watch(
        self, request: str, served: Served, job: Job, prompt: Any, finish: Finish, ask: Callable[[Served], Job]
    ) -> None:
        """Log the answers of a job if it is chosen; `ask` makes the job of the shadow for the same prompt and seeds."""
        shadowed = self.shadow is not None and random.random() < self._share
        if shadowed or self._log.chooses():
            self._log_when_done(request, served, job, prompt, finish, shadow=False)
        if shadowed and self.shadow is not None:
            self._ask_shadow(self.shadow, request, prompt, finish, ask)

    def close(self) -> None:
        """Answer the prompts that wait for the shadow, write the log, and end."""
        if self.shadow is not None:
            self.shadow.batcher.retire()
            self.shadow.batcher.join()
        self._log.close()
        if self.left_out:
            print(f"serve: the shadow was behind and left out {self.left_out} prompts", file=sys.stderr, flush=True)

    def _ask_shadow(
        self, shadow: Served, request: str, prompt: Any, finish: Finish, ask: Callable[[Served], Job]
    ) -> None:
        if shadow.batcher.waiting >= MOST_WAITING:
            self.left_out += 1
            return
        try:
            job = ask(shadow)
        except PosttrainError as error:
            _report(shadow, error)
            return
        self._log_when_done(request, shadow, job, prompt, finish, shadow=True)
        shadow.batcher.submit(job)

    def _log_when_done(
        self, request: str, served: Served, job: Job, prompt: Any, finish: Finish, *, shadow: bool
    ) -> None:
        began = time.time()

        def done(future: Future[list[Completion]]) -> None:
            error = future.exception()
            if error is None:
                self._log.add(
                    GivenAnswers(request, served, prompt, future.result(), lambda c: finish(served, c), began, time.time(), shadow)
                )  # fmt: skip
            elif shadow:
                _report(served, error)

        job.done.add_done_callback(done)


def _report(shadow: Served, error: BaseException) -> None:
    print(
        f"serve: the shadow {shadow.name} did not answer: {printable(redact(str(error)))}", file=sys.stderr, flush=True
    )

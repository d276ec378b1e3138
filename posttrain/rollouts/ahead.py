"""Rounds of answers that are sampled in the background, before the step that trains on them.

With staleness s the answers of step k (counted from 0) are sampled with the weights from before step max(0, k - s). The schedule is a
function of the step number and never of timing, so a run has the same bits at any speed, and after a kill.

With `interrupt` an answer that has as many tokens is cut, and goes on with the weights of the step after: in the last part before its own
step it gets all tokens that are left. So a long answer is not as old as its first token, and each token's version is kept.

Example:
    >>> class Counting:
    ...     version = 0
    ...     def snapshot(self, settings): return self.version
    ...     def sample_with(self, taken, requests, settings): return f"sampled with version {taken}"
    >>> engine = Counting()
    >>> background = Background(engine)
    >>> future = background.submit([], SamplingSettings(max_new_tokens=1, temperature=1.0))
    >>> engine.version = 1  # a step of training meanwhile
    >>> future.result()
    'sampled with version 0'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.packing import as_tensors, from_tensors, packed, unpacked

Answers = list[list[Completion]]


class SnapshotEngine(Protocol):
    """An engine that samples with weights as they were when `snapshot` was called."""

    def snapshot(self, settings: SamplingSettings) -> Any:
        """Keep the present weights, and return a handle of them for a request with these settings."""
        ...

    def sample_with(self, taken: Any, requests: Sequence[Request], settings: SamplingSettings) -> Answers:
        """Return the completions under the weights of `taken`, which is then used up."""
        ...


class Background:
    """Runs the requests to an engine one at a time in a thread, each with the weights of the moment when it was submitted."""

    def __init__(self, engine: SnapshotEngine) -> None:
        self.engine = engine
        self.jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # a daemon: a run that fails elsewhere must not wait for answers that nobody will read
        self.thread = Thread(target=self._work, daemon=True)

    def submit(
        self, requests: Sequence[Request] | Callable[[], Sequence[Request]], settings: SamplingSettings
    ) -> Future[Answers]:
        """Start sampling with the present weights; errors are raised by the result.

        Args:
            requests: or a function that returns them when the answers to all earlier ones are there.
        """
        if not self.thread.is_alive():
            self.thread.start()
        taken, future = self.engine.snapshot(settings), Future[Answers]()

        def job() -> None:
            try:
                asked = requests() if callable(requests) else requests
                future.set_result(self.engine.sample_with(taken, asked, settings))
            except BaseException as error:
                future.set_exception(error)

        self.jobs.put(job)
        return future

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> Answers:
        """Return the completions under the present weights."""
        return self.submit(requests, settings).result()

    def close(self) -> None:
        """Close the engine."""
        close: Callable[[], None] | None = getattr(self.engine, "close", None)
        if close is not None:
            close()

    def _work(self) -> None:
        while True:
            self.jobs.get()()


@dataclass(frozen=True)
class Ahead:
    """Sampling ahead of training.

    Attributes:
        engine: samples in the background.
        staleness: most steps between the weights that sampled an answer and those that it trains.
        steps: of the whole run; no round is sampled for a later step.
        interrupt: most tokens of an answer that one state of the weights samples while later ones are still to come before its step;
            0 for no limit.
    """

    engine: Background
    staleness: int
    steps: int
    interrupt: int = 0


@dataclass
class Round:
    """Answers to the problems at `positions` of the seeded order, perhaps not yet sampled.

    Attributes:
        version: steps that the weights had taken that sample them, or begin to.
        left: tokens that unfinished answers may still get from later weights.
        own: returns the answers to this process's share, once they are there.
    """

    positions: list[int]
    version: int
    wait: Callable[[], Answers] = field(repr=False)
    done: Answers | None = field(default=None, repr=False)
    left: int = 0
    own: Callable[[], Answers] = field(default=list, repr=False)

    def answers(self) -> Answers:
        """Wait for the answers. Every process must call it, in the same order."""
        if self.done is None:
            self.done = self.wait()
        return self.done

    def state(self) -> dict[str, Any]:
        """Return the round with its answers, for a checkpoint."""
        return {
            "positions": self.positions,
            "version": self.version,
            "left": self.left,
            "answers": as_tensors(packed(self.answers())),
        }


def restored(state: Mapping[str, Any]) -> Round:
    """Return the round of a checkpoint."""
    answers = unpacked(from_tensors(state["answers"]))
    return Round(list(state["positions"]), state["version"], lambda: answers, answers, state["left"])


def begun(answers: Answers, version: int) -> Answers:
    """Return first parts of answers with the version of the weights that sampled them."""
    return [[replace(each, parts=((version, len(each.tokens)),)) for each in group] for group in answers]


def unfinished(requests: Sequence[Request], answers: Answers) -> list[Request]:
    """Return a request for each answer that has not ended, which goes on after its tokens. Its seed has one more number."""
    return [
        replace(asked, prompt=asked.prompt + answer.tokens, seeds=((*seed, len(answer.parts)),))
        for asked, group in zip(requests, answers, strict=True)
        for seed, answer in zip(asked.seeds, group, strict=True)
        if not answer.finished
    ]


def continued(answers: Answers, more: Answers, version: int) -> Answers:
    """Return the answers with the further tokens of those that had not ended.

    Example:
        >>> first = begun([[Completion((5,), (-1.0,), True), Completion((6,), (-2.0,), False)]], version=3)
        >>> continued(first, [[Completion((7, 8), (-0.5, -0.1), True)]], version=4)[0][1]
        Completion(tokens=(6, 7, 8), logprobs=(-2.0, -0.5, -0.1), finished=True, weights=None, messages=(), parts=((3, 1), (4, 2)))
    """
    rest = iter(more)

    def grown(answer: Completion) -> Completion:
        if answer.finished:
            return answer
        [added] = next(rest)
        return replace(
            answer,
            tokens=answer.tokens + added.tokens,
            logprobs=answer.logprobs + added.logprobs,
            finished=added.finished,
            parts=(*answer.parts, (version, len(added.tokens))),
        )

    return [[grown(answer) for answer in group] for group in answers]


def age(step: int, completions: Sequence[Completion]) -> float:
    """Return the mean over tokens of the steps since the weights that sampled them; rounds of a step itself have no parts."""
    aged = sum((step - version) * tokens for c in completions for version, tokens in c.parts)
    return aged / sum(c.sampled for c in completions)

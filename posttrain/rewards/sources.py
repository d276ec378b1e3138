"""Named reward sources. Errors name the source that failed, and a missing reward stays missing instead of becoming 0.

Example:
    >>> source = FunctionReward("short", lambda prompts, completions, **_: [-len(text) for text in completions])
    >>> source.score(RewardBatch(["a", "b"], ["no", "never"], [], {}))
    [-2.0, -5.0]
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Literal, Protocol

import torch
from tqdm import tqdm

from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.data.whole_texts import read_ends, read_texts
from posttrain.errors import NotFiniteError, RewardError, RewardTimeoutError
from posttrain.models.inference import scores_and_spreads
from posttrain.models.policy import Scorer
from posttrain.rewards.calling import CallResult, RewardFunction, call
from posttrain.rewards.judge import Judge
from posttrain.rewards.worker import Worker
from posttrain.text import one_line

OnFailure = Literal["stop", "skip"]
LARGEST_REWARD = 1e15
"""Largest size of a reward: the square of a larger one overflows where advantages are normalised."""
NAMED_ROWS = 5
"""Most rows that a message lists."""


@dataclass(frozen=True)
class RewardBatch:
    """Answers to score: texts, token ids and the columns of their problems; each list has one entry per answer.

    Attributes:
        ids: the table row of each answer's problem; empty if unknown, and then messages number the answers instead.
        conversations: the turns after each prompt, if there may be several; `completions` are then the last ones.
    """

    prompts: list[Any]
    completions: list[str]
    tokens: list[Tokens]
    columns: dict[str, list[Any]]
    ids: list[Any] = field(default_factory=list)
    conversations: list[list[dict[str, Any]]] = field(default_factory=list)


@contextmanager
def _usual_settings() -> Iterator[None]:
    """Undo changes that a reward function makes in torch for the whole process, such as gradients that are off, or the thread count."""
    threads, dtype, device = torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


class RewardSource(Protocol):
    """A named source of rewards: a number per answer, None if it does not apply to the answer, NaN if it failed on it.

    Attributes:
        failures: number of answers without a reward because the source raised ("failed") or exceeded its time ("timed_out").
    """

    name: str
    failures: Counter[str]

    def score(self, answers: RewardBatch) -> list[float | None]: ...

    def used(self) -> dict[str, float]:
        """Return counts since the last call, such as questions to a judge; empty for most sources."""
        ...


class FunctionReward:
    """A function of texts and columns, called in this process or, as a Worker, in a separate process; or a Judge.

    Args:
        on_failure: `stop` raises RewardError with the rows; `skip` reports on stderr and leaves those rows without a reward.
    """

    def __init__(
        self,
        name: str,
        function: RewardFunction | Worker | Judge,
        arguments: Mapping[str, Any] | None = None,
        on_failure: OnFailure = "stop",
    ) -> None:
        self.name, self.arguments, self.on_failure = name, dict(arguments or {}), on_failure
        self.function = function
        self.call = function if isinstance(function, Worker | Judge) else partial(call, function)
        self.failures: Counter[str] = Counter()

    def score(self, answers: RewardBatch) -> list[float | None]:
        count = len(answers.completions)
        kind = "failed"
        try:
            with _usual_settings():
                result = self.call(answers.prompts, answers.completions, answers.columns, self.arguments)
        except RewardError as error:
            kind = "timed_out" if isinstance(error, RewardTimeoutError) else "failed"
            result = CallResult([None] * count, dict.fromkeys(range(count), str(error)))
        if result.failures:
            self._failed(kind, answers, result)
        checked = _checked(self.name, result.values, answers)
        return [math.nan if row in result.failures else value for row, value in enumerate(checked)]

    def used(self) -> dict[str, float]:
        """Return a judge's counts since the last call."""
        return self.function.used() if isinstance(self.function, Judge) else {}

    def _failed(self, kind: str, answers: RewardBatch, result: CallResult) -> None:
        rows, message = sorted(result.failures), next(iter(result.failures.values()))
        message = one_line(message) if self.on_failure == "stop" else message
        verb = "took too long" if kind == "timed_out" else "failed"
        ids = [answers.ids[row] for row in rows] if answers.ids else rows
        listed = ", ".join(str(i) for i in dict.fromkeys(ids[:NAMED_ROWS])) + (", …" if len(rows) > NAMED_ROWS else "")
        report = (
            f"reward {self.name!r} {verb} on {len(rows)} of {len(answers.completions)} answers ({'rows' if answers.ids else 'answers'}"
            f" {listed}; the first to prompt {_short(answers.prompts[rows[0]])}: {_short(answers.completions[rows[0]])}): {message}"
        )
        if self.on_failure == "stop":
            if kind == "failed" and len(rows) == len(answers.completions):
                # the function fails on everything: to skip would leave no reward and hide the fault
                columns = ", ".join(["prompts", "completions", *answers.columns])
                remedy = f"Correct the function, or give what it needs: it is called with {columns}"
            else:
                remedy = f"Correct the function, or skip such answers with rewards.{self.name}.on_failure: skip"
            failure = (RewardTimeoutError if kind == "timed_out" else RewardError)(
                f"{report}. {remedy}"
                + (f"; raise the limit with limits.reward_seconds.{self.name}" if kind == "timed_out" else "")
            )
            if result.trace:
                failure.add_note(result.trace)
            raise failure
        self.failures[kind] += len(rows)
        tqdm.write(f"{report}; they get no reward", file=sys.stderr)


class ModelReward:
    """A reward model. Its mean on the training pairs is subtracted, because the score is only defined up to a constant.

    Args:
        micro_batch_tokens: most tokens of one forward pass.
        encoder: of a model that was trained elsewhere, which reads texts; None: it reads the policy's tokens.
        context: most tokens that a model without an encoder reads; it reads the ends of longer conversations.
    """

    def __init__(
        self,
        name: str,
        scorer: Scorer,
        mean: float,
        micro_batch_tokens: int,
        bf16: bool = False,
        encoder: TextEncoder | None = None,
        context: int | None = None,
    ) -> None:
        self.encoder, self.context = encoder, context if encoder is None else encoder.max_length
        self.name, self.scorer, self.mean, self.micro_batch_tokens, self.bf16 = (
            name,
            scorer,
            mean,
            micro_batch_tokens,
            bf16,
        )
        self.failures: Counter[str] = Counter()
        self._spreads: list[float] = []
        self._cut = self._read = 0
        self._reported = False

    def score(self, answers: RewardBatch) -> list[float | None]:
        if self.encoder is not None:
            said = answers.conversations or answers.completions
            pad = self.scorer.model.config.get_text_config().pad_token_id
            tokens, cut = read_texts(self.encoder, answers.prompts, said, answers.columns, pad)
        else:
            tokens, cut = read_ends(answers.tokens, self.context)
        if cut and not self._reported:
            tqdm.write(
                f"reward {self.name!r}: {cut} of {len(tokens)} conversations exceed the reward model's context of"
                f" {self.context} tokens; it reads only their ends. Later ones are counted as reward/{self.name}/cut",
                file=sys.stderr,
            )
        self._reported = self._reported or cut > 0
        self._cut, self._read = self._cut + cut, self._read + len(tokens)
        found = scores_and_spreads(self.scorer, tokens, self.micro_batch_tokens, self.bf16)
        values = [score for score, _ in found]
        if self.scorer.heads > 1:
            self._spreads += [spread for _, spread in found]
        # a model scores every answer, so NaN is an error here and not a missing reward
        return _checked(self.name, [value - self.mean for value in values], answers, nan_is_missing=False)

    def used(self) -> dict[str, float]:
        """Return measurements over the answers since the last call.

        An ensemble has the mean standard deviation of its heads; a model that reads texts, or has read too long ones, the share of
        those that it read without their start.
        """
        spreads, self._spreads = self._spreads, []
        cut, self._cut, read, self._read = self._cut, 0, self._read, 0
        shares = {"cut": cut / read} if read and (self._reported or self.encoder is not None) else {}
        return shares | ({"disagreement": sum(spreads) / len(spreads)} if spreads else {})


def _short(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "…" + shown[0]


def _checked(
    name: str, values: Sequence[Any], answers: RewardBatch, *, nan_is_missing: bool = True
) -> list[float | None]:
    expected = len(answers.completions)
    if len(values) != expected:
        raise RewardError(
            f"reward {name!r} returned {len(values)} numbers for {expected} answers;"
            " it must return one per answer, None for an answer that it does not apply to"
        )
    checked: list[float | None] = []
    broken = []
    for i, value in enumerate(values):
        number: Any = value
        if value is None or (nan_is_missing and isinstance(value, Real) and number != number):
            checked.append(None)
        elif isinstance(value, Real):
            inside = bool(-LARGEST_REWARD <= number <= LARGEST_REWARD)  # False for NaN
            checked.append(float(value) if inside else math.nan)
            broken += [] if inside else [i]
        else:
            nested = isinstance(value, list | tuple) or getattr(value, "shape", ()) != ()
            hint = ", so it returned one list per answer; take the number out of it" if nested else ""
            raise RewardError(
                f"reward {name!r} returned {_short(value)} ({type(value).__name__}){hint}; it must be a finite number or None"
            )
    if broken:
        ids = list(dict.fromkeys(f"problem {answers.ids[i]}" for i in broken)) if answers.ids else []
        raise NotFiniteError(
            f"reward {name!r} returned {_short(values[broken[0]])}; it must be None or a finite number of at most {LARGEST_REWARD:g}",
            ids,
        )
    return checked

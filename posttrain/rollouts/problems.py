"""Problems to answer, and their answers as reward functions read them.

Example:
    >>> request(Problem("2+2=", (5, 6), {"answer": "4"}), seeds=((0, 1),)).columns
    {'answer': '4'}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.distributed import on_main_process
from posttrain.errors import DataError
from posttrain.rewards.sources import RewardBatch, RewardSource
from posttrain.rollouts.engine import Completion, Request


@dataclass(frozen=True)
class Problem:
    """A prompt to answer; `columns` are passed to the reward functions.

    Attributes:
        row: id of the row in its table, for messages.
        teacher_ids: the prompt that a teacher reads before the student's answer; None: the student's own.
    """

    prompt: Any
    ids: tuple[int, ...]
    columns: dict[str, Any]
    row: int | None = None
    teacher_ids: tuple[int, ...] | None = None


def request(problem: Problem, seeds: tuple[tuple[int, ...], ...]) -> Request:
    """Return the request for one answer to a problem per seed."""
    return Request(problem.ids, seeds, problem.prompt, problem.columns)


def judged_text(encoder: TextEncoder, completion: Completion) -> str:
    """Return the text that is judged: the answer, or the last turn of a conversation."""
    return str(completion.messages[-1]["content"]) if completion.messages else encoder.text(completion.tokens)


CONVERSATION = "conversation"
"""Column in which a reward function finds the turns after the prompt, if there may be several."""


def reward_batch(
    problems: Sequence[Problem], texts: list[str], tokens: list[Tokens], completions: Sequence[Completion] = ()
) -> RewardBatch:
    """Return answers as reward sources read them: one problem, text and token sequence per answer."""
    columns = {name: [problem.columns[name] for problem in problems] for name in problems[0].columns}
    conversations = [[dict(message) for message in c.messages] for c in completions if c.messages]
    if conversations:
        if CONVERSATION in columns:
            raise DataError(
                f"the rows have a column {CONVERSATION!r}, by which rewards get the turns of an answer; rename the column of the rows"
            )
        columns[CONVERSATION] = conversations
    rows = [problem.row for problem in problems]
    ids = [] if None in rows else rows
    return RewardBatch([p.prompt for p in problems], texts, tokens, columns, ids, conversations)


def score_on_one_process(
    accelerator: Accelerator, rewards: Sequence[RewardSource], answers: RewardBatch
) -> dict[str, list[float | None]]:
    """Score on one process for all: rewards with time-outs are not deterministic, so rank 0 scores and broadcasts."""
    return on_main_process(accelerator, lambda: {reward.name: reward.score(answers) for reward in rewards})

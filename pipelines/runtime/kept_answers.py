"""Choose the answers worth reading from the tables of rollouts that an align run kept.

Only the best few of each kind are in memory, so that a run's tables may be larger than it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.runtime.publish import ARTIFACTS
from posttrain.errors import DataError

PATTERN = "rollouts-*.parquet"
BEST, WORST, CHANGED, FOOLED = "highest reward", "lowest reward", "most changed", "high score, low true reward"
"""Kinds, in the order of pages.

`most changed` is by log p of the policy that sampled the answer minus log p of the reference. The score of the last kind is the reward
model's, or the total reward if there is none; `low true reward` comes first, the score second.
"""
KINDS = (BEST, WORST, CHANGED, FOOLED)
_READ = ("kind", "prompt", "completion", "reward", "rollout_logprobs", "ref_logprobs")
_SOURCE = "reward/"


@dataclass(frozen=True)
class KeptAnswer:
    """One sampled answer of a training step, chosen as one of `kind`.

    Attributes:
        row: of the answer in its step's table.
        log_ratio: log p minus log p of the reference, of the whole answer in nats; NaN if the step did not measure it.
        rewards: of each source that judged it.
    """

    kind: str
    step: int
    row: int
    prompt: str
    completion: str
    reward: float
    log_ratio: float
    rewards: Mapping[str, float]


Ranked = tuple[tuple[float, ...], KeptAnswer]
"""An answer after its rank: larger is shown first, and no two answers of a run have the same."""


def kept_answers(folder: Path, truth: str, models: Sequence[str], count: int) -> list[KeptAnswer]:
    """Return up to `count` answers of each kind from a run's tables, the kinds in their order and the first of each foremost.

    Of equal answers the latest step counts, and no text of one prompt is shown twice within a kind.

    Args:
        folder: of the run, live or in runs/.
        truth: name of the reward that is the true one.
        models: names of the rewards that are reward models.

    Raises:
        DataError: a table cannot be read.
    """
    found: dict[str, list[Ranked]] = {kind: [] for kind in KINDS}
    highest = -math.inf
    for path in sorted((folder / ARTIFACTS).glob(PATTERN)):
        for answer in _answers(path):
            highest = max(highest, answer.rewards.get(truth, -math.inf))
            for kind, rank in _ranks(answer, truth, models):
                _add(found[kind], (rank, replace(answer, kind=kind)), count)
    # an answer of the highest true reward is no case of reward hacking
    found[FOOLED] = [(rank, answer) for rank, answer in found[FOOLED] if answer.rewards[truth] < highest]
    return [answer for kind in KINDS for _, answer in sorted(found[kind], key=_rank, reverse=True)]


def _add(best: list[Ranked], new: Ranked, count: int) -> None:
    """Keep an answer if it is among the `count` best of its kind, and an equal text only with its better rank."""
    text = (new[1].prompt, new[1].completion)
    same = [entry for entry in best if (entry[1].prompt, entry[1].completion) == text]
    others = [entry for entry in best if entry not in same]
    best[:] = sorted([*others, max([*same, new], key=_rank)], key=_rank, reverse=True)[:count]


def _rank(entry: Ranked) -> tuple[float, ...]:
    return entry[0]


def _ranks(answer: KeptAnswer, truth: str, models: Sequence[str]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield the kinds that an answer may be one of, and its rank in each."""
    late = (float(answer.step), -float(answer.row))
    if math.isfinite(answer.reward):
        yield BEST, (answer.reward, *late)
        yield WORST, (-answer.reward, *late)
    if math.isfinite(answer.log_ratio):
        yield CHANGED, (answer.log_ratio, *late)
    true, scores = answer.rewards.get(truth), [answer.rewards[name] for name in models if name in answer.rewards]
    if true is not None and scores:
        yield FOOLED, (-true, scores[0], *late)
    elif true is not None and not models and answer.reward > true:
        yield FOOLED, (-true, answer.reward, *late)


def _answers(path: Path) -> Iterator[KeptAnswer]:
    """Yield the sampled answers of one step's table; demonstrations have no reward and are left out."""
    step = int(path.stem.rpartition("-")[2])
    try:
        file = pq.ParquetFile(path)
        sources = [name for name in file.schema_arrow.names if name.startswith(_SOURCE)]
        table = file.read(columns=[*_READ, *sources])
        columns = {name: table.column(name).to_pylist() for name in table.column_names if "logprobs" not in name}
        ratios = _log_ratios(table)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: not a table of rollouts that can be read ({error}); restore it with `dvc checkout`"
        ) from error
    for row, kind in enumerate(columns["kind"]):
        if kind == "answer":
            given = {name.removeprefix(_SOURCE): columns[name][row] for name in sources}
            known = {name: float(value) for name, value in given.items() if value is not None}
            reward = _number(columns["reward"][row])
            yield KeptAnswer(
                "", step, row, columns["prompt"][row], columns["completion"][row], reward, ratios[row], known
            )


def _log_ratios(table: pa.Table) -> list[float]:
    """Return log p minus log p of the reference of each row; NaN if the step did not measure one of them."""
    pairs = zip(table.column("rollout_logprobs"), table.column("ref_logprobs"), strict=True)
    return [
        float(np.sum(own.values.to_numpy(zero_copy_only=False) - ref.values.to_numpy(zero_copy_only=False)))
        if own.is_valid and ref.is_valid
        else math.nan
        for own, ref in pairs
    ]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)

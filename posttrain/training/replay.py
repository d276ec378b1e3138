"""Keep the inputs of the updates of an on-policy step, and compute the updates again.

Example:
    >>> import numpy as np
    >>> from posttrain.data.tokens import Tokens
    >>> from posttrain.training.onpolicy import Experience
    >>> rows = [Experience(Tokens((1,), (2, i)), np.ones(2, np.float32), np.zeros(2, np.float32), None) for i in (3, 4)]
    >>> step = keep_step(7, [rows, rows[:1]], kl_coefficient=0.0)
    >>> len(step.rows), [update.rows for update in step.updates]
    (2, [[0, 1], [0]])
    >>> [[row.tokens.response for row in batch] for batch in batches_of(step)]
    [[(2, 3), (2, 4)], [(2, 3)]]
    >>> differences({"loss": 0.25, "seen": 1.0}, {"loss": 0.5, "unseen": 2.0})
    [Difference(name='loss', recorded=0.25, replayed=0.5)]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from posttrain.errors import NotFiniteError
from posttrain.training.loop import mean_of
from posttrain.training.onpolicy import Demonstration, OnPolicyObjective, OnPolicyRow
from posttrain.training.trainer import Trainer


@dataclass(frozen=True)
class KeptUpdate:
    """The batch of one optimiser step.

    Attributes:
        rows: indices into the step's rows, in the order of the batch.
        weight: of its sampled answers; 1 without an expert stream.
        expert_weight: of its demonstrations.
    """

    rows: list[int]
    weight: float = 1.0
    expert_weight: float = 0.0


@dataclass(frozen=True)
class KeptStep:
    """Everything that the updates of a step were computed from, except the weights.

    Attributes:
        step: counted from 1.
        rows: each answer and demonstration once.
        updates: the batches; empty if only some of the answers were kept, so that the step cannot be replayed.
        kl_coefficient: of the KL in the loss.
    """

    step: int
    rows: list[OnPolicyRow]
    updates: list[KeptUpdate]
    kl_coefficient: float


class Difference(NamedTuple):
    """A metric whose value differs from the recorded one."""

    name: str
    recorded: float
    replayed: float


def keep_step(step: int, batches: Sequence[Sequence[OnPolicyRow]], kl_coefficient: float) -> KeptStep:
    """Return the batches of a step with every row once: epochs and expert weights repeat an answer's data."""
    found: dict[int, int] = {}
    rows: list[OnPolicyRow] = []
    updates = []
    for batch in batches:
        members, weight, expert_weight = [], 1.0, 0.0
        for row in batch:
            if id(row.tokens) not in found:
                found[id(row.tokens)] = len(rows)
                rows.append(row)
            members.append(found[id(row.tokens)])
            if isinstance(row, Demonstration):
                expert_weight = row.weight
            else:
                weight = row.weight
        updates.append(KeptUpdate(members, weight, expert_weight))
    return KeptStep(step, rows, updates, kl_coefficient)


def batches_of(kept: KeptStep) -> list[list[OnPolicyRow]]:
    """Return the batches of a kept step, one per update."""
    return [
        [
            replace(row, weight=update.expert_weight if isinstance(row, Demonstration) else update.weight)
            for row in (kept.rows[index] for index in update.rows)
        ]
        for update in kept.updates
    ]


def replay_step(
    trainer: Trainer[OnPolicyRow], objective: OnPolicyObjective, kept: KeptStep, skips: bool = False
) -> dict[str, float]:
    """Run the updates of a step on the trainer's weights, and return their merged metrics.

    Args:
        skips: True if the run skipped an update of this step, because its loss or gradient was not finite.

    Raises:
        NotFiniteError: an update has a numerical fault that the run did not have.
    """
    objective.kl_coefficient = kept.kl_coefficient
    done = []
    for batch in batches_of(kept):
        try:
            done.append(trainer.update(batch, objective))
        except NotFiniteError:
            if not skips:
                raise
    return mean_of(done)


def differences(recorded: Mapping[str, float], replayed: Mapping[str, float]) -> list[Difference]:
    """Return the metrics in both whose values are not equal to the last bit, sorted by name; two NaN are equal."""
    return [
        Difference(name, recorded[name], replayed[name])
        for name in sorted(set(recorded) & set(replayed))
        if recorded[name] != replayed[name] and not (math.isnan(recorded[name]) and math.isnan(replayed[name]))
    ]

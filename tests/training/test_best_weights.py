"""The weights that are kept are those of the best measured step, also after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.data.batches import EpochOrder
from posttrain.settings import OptimizerSettings
from posttrain.training.best_weights import BestWeights
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.loop import LoopSettings, fit
from posttrain.training.supervised import EpochSource
from posttrain.training.trainer import Trainer
from tests.training.cases import case
from tests.training.runs import Killed, Memory

STEPS = 7
SCORES = {2: 0.25, 4: 0.75, 6: 0.75, 7: 0.5}
"""A measurement every two steps and after the last one; the best score comes twice."""


def trained(folder: Path, recorder: Memory, seen: dict[int, dict[str, Tensor]]) -> BestWeights[Any]:
    """Train with one score per measured step; `seen` gets the weights of every measured step."""
    torch.manual_seed(0)
    made = case("sft")
    trainer: Trainer[Any] = Trainer(made.model(), OptimizerSettings(3e-3), total_steps=STEPS, micro_batch_tokens=60)
    source: EpochSource[Any] = EpochSource(made.rows, EpochOrder(len(made.rows), 3, 4, seed=4))

    def scored() -> float:
        step = trainer.updates
        seen[step] = {name: weight.clone() for name, weight in trainer.weights().items()}
        return SCORES[step]

    best: BestWeights[Any] = BestWeights(source, scored, trainer.weights, every=2, last=STEPS, name="answer")
    settings = LoopSettings("sft", STEPS, checkpoint_steps=3)
    fit(trainer, best, made.objective, settings, recorder, Checkpoints(folder), best)
    return best


def test_the_earliest_best_step_is_kept(tmp_path: Path) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    recorder = Memory()
    best = trained(tmp_path, recorder, seen)
    assert (best.step, best.score, best.measured) == (4, 0.75, 4)
    assert {
        step: row["selection/answer"] for step, row in recorder.steps.items() if "selection/answer" in row
    } == SCORES
    assert best.weights.keys() == seen[4].keys()
    assert all(torch.equal(weight, seen[4][name]) for name, weight in best.weights.items())
    assert not all(torch.equal(weight, seen[7][name]) for name, weight in best.weights.items())


@pytest.mark.parametrize("kill_at", [3, 5, 7])
def test_a_killed_run_keeps_the_same_weights(kill_at: int, tmp_path: Path) -> None:
    straight = trained(tmp_path / "straight", Memory(), {})
    recorder = Memory(kill_at=kill_at)
    with pytest.raises(Killed):
        trained(tmp_path / "killed", recorder, {})
    recorder.kill_at = None
    resumed = trained(tmp_path / "killed", recorder, {})
    assert (resumed.step, resumed.score, resumed.measured) == (4, 0.75, 4)
    assert all(torch.equal(weight, straight.weights[name]) for name, weight in resumed.weights.items())

"""Reward sources by name, as params.yaml's `rewards` describes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.run import Run
from pipelines.sections import ComputeParams
from posttrain.models.folders import load_scorer
from posttrain.models.policy import Scorer
from posttrain.rewards.sources import FunctionReward, ModelReward, RewardSource, find_function

if TYPE_CHECKING:
    import torch

REWARD = Path("models/reward")


def reward_sources(run: Run, names: Sequence[str], device: torch.device, compute: ComputeParams) -> list[RewardSource]:
    """The sources of `names`; a reward model is loaded once, frozen."""
    sources: list[RewardSource] = []
    for name in names:
        section = run.params.rewards[name]
        if section.function == "reward_model":
            mean = json.loads((REWARD / "config.json").read_text(encoding="utf-8")).get("reward_mean", 0.0)
            scorer = Scorer(load_scorer(REWARD)).to(device).eval().requires_grad_(False)
            sources.append(ModelReward(name, scorer, mean, compute.micro_batch_tokens, compute.bf16))
        else:
            sources.append(FunctionReward(name, find_function(section.function), dict(section.arguments)))
    return sources

"""Build the reward sources that params.yaml's `rewards` describes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config.reward_arguments import judge_settings
from pipelines.config.schema import DEFAULT_TIMEOUT_SECONDS, ComputeParams, RewardFunctionParams
from posttrain.data.whole_texts import READS_TEXT
from posttrain.errors import ConfigError
from posttrain.models.folders import context_length, load_encoder
from posttrain.models.policy import Scorer
from posttrain.models.scorers import load_scorer
from posttrain.rewards import require_available
from posttrain.rewards.functions import BUILT_IN
from posttrain.rewards.judge import Judge
from posttrain.rewards.sources import FunctionReward, ModelReward, RewardSource
from posttrain.rewards.worker import Worker

if TYPE_CHECKING:
    import torch

    from pipelines.runtime.recorder import RunRecorder

REWARD = Path("models/reward")
JUDGE_SECONDS = 600.0
"""Time for a judge's answers about one batch."""


def reward_sources(
    sections: Mapping[str, RewardFunctionParams],
    names: Sequence[str],
    device: torch.device,
    compute: ComputeParams,
    seconds: Mapping[str, float],
) -> list[RewardSource]:
    """Return the sources of `names`; a reward model is loaded once and frozen. `seconds` are time limits by name."""
    sources: list[RewardSource] = []
    for name in names:
        section = sections[name]
        if section.function == "reward_model":
            config = json.loads((REWARD / "config.json").read_text(encoding="utf-8"))
            scorer = Scorer(load_scorer(REWARD)).to(device).eval().requires_grad_(False)
            encoder = load_encoder(REWARD) if config.get(READS_TEXT) else None
            mean = config.get("reward_mean", 0.0)
            context = context_length(scorer.model.config)
            sources.append(ModelReward(name, scorer, mean, compute.micro_batch_tokens, compute.bf16, encoder, context))
        else:
            sources.append(_function_reward(name, section, seconds.get(name)))
    return sources


def judges_used(sources: Sequence[RewardSource]) -> list[str]:
    """Return a line for each judge among the sources: the questions of this process, and their tokens."""
    return [f"judge {name}: {judge.server.summary()}" for name, judge in _judges(sources).items()]


class JudgeTokens:
    """Record the tokens that this process pays judges for, among the measurements: they depend on what is cached."""

    def __init__(self, recorder: RunRecorder, sources: Sequence[RewardSource]) -> None:
        self._recorder, self._judges = recorder, _judges(sources)
        self._recorded = dict.fromkeys(self._judges, (0, 0))

    def record(self) -> None:
        """Record the tokens since the last call, for each judge that was asked."""
        for name, judge in self._judges.items():
            paid = judge.server.paid
            total, before = (paid["prompt_tokens"], paid["completion_tokens"]), self._recorded[name]
            if total != before:
                self._recorder.judged(judge.settings.model, total[0] - before[0], total[1] - before[1])
                self._recorded[name] = total


def _judges(sources: Sequence[RewardSource]) -> dict[str, Judge]:
    """Return the judges among the sources by the name of their reward."""
    return {s.name: s.function for s in sources if isinstance(s, FunctionReward) and isinstance(s.function, Judge)}


def _limit_seconds() -> float | None:
    """Return the time limit of this machine (POSTTRAIN_REWARD_SECONDS), which is no parameter and makes no stage stale; None if unset."""
    text = os.environ.get("POSTTRAIN_REWARD_SECONDS")
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86_400:
        raise ConfigError(f"POSTTRAIN_REWARD_SECONDS = {text[:40]!r}: must be a number of seconds above 0, up to 86400")
    return seconds


def _function_reward(name: str, section: RewardFunctionParams, limit: float | None) -> FunctionReward:
    """Return a function reward. A fast built-in is called directly; any other function runs in its own process with a time limit."""
    require_available(section.function)
    if section.function == "judge":
        judge = Judge(judge_settings(section.arguments), _limit_seconds() or limit or JUDGE_SECONDS)
        return FunctionReward(name, judge, on_failure=section.on_failure)
    if section.function in BUILT_IN and section.function != "math" and limit is None:
        return FunctionReward(name, BUILT_IN[section.function], section.arguments, section.on_failure)
    worker = Worker(section.function, _limit_seconds() or limit or DEFAULT_TIMEOUT_SECONDS)
    return FunctionReward(name, worker, section.arguments, section.on_failure)

"""One batch with uneven lengths for every preset, and a trainer that shows its gradient instead of stepping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from posttrain.algorithms import PRESETS
from posttrain.algorithms.specs import LoggedGroups, OnPolicy, Preference, Unpaired
from posttrain.data.tokens import Tokens
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.settings import OptimizerSettings
from posttrain.training.onpolicy import Demonstration, Experience, OnPolicyObjective
from posttrain.training.preference import (
    Answer,
    AnswerGroup,
    LoggedGroupsObjective,
    PreferenceObjective,
    PreferencePair,
)
from posttrain.training.sharding import full
from posttrain.training.supervised import Example, RewardObjective, RewardPair, SupervisedObjective
from posttrain.training.trainer import Trainer
from posttrain.training.unpaired import LabelledAnswer, UnpairedObjective
from tests.models import small

MAX_LENGTH = 12
NAMES = [*sorted(PRESETS), "sft", "sft_all", "reward"]


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    objective: Any
    rows: list[Any]


class Probe(Trainer[Any]):
    """Keeps the gradient of the last update, and takes no step."""

    gradient: dict[str, torch.Tensor]

    def _step(self) -> dict[str, float]:
        self.gradient = {
            name: full(torch.zeros_like(p) if p.grad is None else p.grad.clone())
            for name, p in self.unwrapped.named_parameters()
        }
        self.optimizer.zero_grad()
        return {}


def probe(model: nn.Module, budget: int, **options: Any) -> Probe:
    return Probe(model, OptimizerSettings(1e-3), total_steps=1, micro_batch_tokens=budget, **options)


def case(name: str, double: bool = False) -> Case:
    if name in ("sft", "sft_all"):
        # the row in the middle has nothing to learn from
        tokens = [*small.rows(4), Tokens((5, 6, 7, 8), ()), *small.rows(3, seed=1)]
        rows = [Example(t, weight=1.5 - 0.2 * i) for i, t in enumerate(tokens)]
        return Case(
            lambda: small.policy(double=double), SupervisedObjective("all" if name == "sft_all" else "completion"), rows
        )
    if name == "reward":
        pairs = [
            RewardPair(c, r, margin=0.1 * i, target=1 - 0.07 * i)
            for i, (c, r) in enumerate(zip(small.rows(7), small.answers(small.rows(7), seed=1), strict=True))
        ]
        return Case(lambda: small.scorer(double=double), RewardObjective(0.05), pairs)
    spec = PRESETS[name]
    if isinstance(spec, OnPolicy):
        rows = experiences(spec)
        return Case(
            lambda: small.policy(critic=spec.has_critic, double=double),
            OnPolicyObjective(spec, MAX_LENGTH, 0.8),
            rows,
        )
    if isinstance(spec, Preference):
        return Case(lambda: small.policy(double=double), PreferenceObjective(spec), pairs_for(spec))
    if isinstance(spec, Unpaired):
        labelled = [
            LabelledAnswer(p.chosen, i % 3 != 1, p.rejected, baseline=0.3) for i, p in enumerate(pairs_for(spec))
        ]
        return Case(lambda: small.policy(double=double), UnpairedObjective(spec), labelled)
    assert isinstance(spec, LoggedGroups)
    groups = [AnswerGroup((p.chosen, p.rejected), (0.5, -0.5)) for p in pairs_for(PRESETS["dpo"])]
    ranked = small.rows(3, seed=7)
    groups.append(AnswerGroup(tuple(map(Answer, ranked, small.numbers(ranked, 8))), (2.0, -1.0, 0.5)))
    return Case(lambda: small.policy(double=double), LoggedGroupsObjective(spec), groups)


def near(
    policy: Policy, tokens: Sequence[Tokens], seed: int, spread: float, temperature: float = 1.0
) -> list[np.ndarray]:
    """Return the policy's own log-probabilities, moved a little: those of an older policy."""
    own = token_logprobs(policy, tokens, 10_000, temperature)
    return [n.logprobs + noise for n, noise in zip(own, small.numbers(tokens, seed, spread), strict=True)]


def experiences(spec: OnPolicy) -> list[Any]:
    first = small.rows(4, seed=3)
    # two answers to each of three prompts, one of them alone
    tokens = [*first, *small.answers(first[:3], seed=16)]
    policy = small.policy()
    old = near(policy, tokens, 54, 5e-4 if spec.ratio == "sequence" else 0.2, 0.8)
    reference = near(policy, tokens, 5, 0.5, 0.8)
    advantages, values, returns = (small.numbers(tokens, seed) for seed in (6, 7, 8))
    sampled = [o + n for o, n in zip(old, small.numbers(tokens, 9, 0.01), strict=True)]
    mu = 0.3 if spec.has_expert else 0.0
    made: list[Any] = [
        Experience(
            tokens=t,
            advantages=advantages[i] if spec.has_critic else np.full_like(advantages[i], advantages[i][0]),
            rollout_logprobs=sampled[i],
            ref_logprobs=reference[i],
            old_logprobs=old[i],
            old_values=values[i] if spec.has_critic else None,
            returns=returns[i] if spec.has_critic else None,
            trained=i != 4,
            weight=1 - mu,
        )
        for i, t in enumerate(tokens)
    ]
    # order matters to nobody, so expert rows stand in between
    experts = [Demonstration(t, mu) for t in small.rows(4, seed=10)] if spec.has_expert else []
    return [*made[:3], *experts, *made[3:]]


def pairs_for(spec: Any) -> list[PreferencePair]:
    chosen = small.rows(7, seed=11)
    rejected = small.answers(chosen, seed=12)
    policy = small.policy()
    references = [near(policy, tokens, seed, 0.5) for tokens, seed in ((chosen, 13), (rejected, 14))]
    if not spec.needs_reference:
        references = [[np.zeros_like(r) for r in side] for side in references]
    gaps = small.numbers([Tokens((1,), (1,) * 7)], 15)[0]
    return [
        PreferencePair(Answer(chosen[i], references[0][i]), Answer(rejected[i], references[1][i]), float(gaps[i]))
        for i in range(7)
    ]


def with_record(made: Case, **options: Any) -> Case:
    """Return the case with other options of its record."""
    objective = made.objective
    spec = replace(objective.spec, **options)
    if isinstance(spec, OnPolicy):
        return replace(made, objective=OnPolicyObjective(spec, objective.max_length, objective.temperature))
    return replace(made, objective=type(objective)(spec))

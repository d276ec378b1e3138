"""Whole small trainings that can be started, killed and started again, each from nothing but its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from posttrain.algorithms import PRESETS
from posttrain.algorithms.specs import OnPolicy
from posttrain.data.batches import EpochOrder
from posttrain.data.tokens import TextEncoder
from posttrain.models.lora import Adapter, BasePolicy
from posttrain.models.policy import Policy
from posttrain.models.tiny import byte_tokenizer
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.engine import SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings, Problem
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import LoraSettings, OptimizerSettings
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.experience import Demonstrations, ExperienceSource
from posttrain.training.loop import LoopSettings, fit
from posttrain.training.onpolicy import OnPolicyObjective
from posttrain.training.supervised import EpochSource
from posttrain.training.trainer import Trainer
from tests.models import small
from tests.training.cases import case

STEPS = 6
OPTIMIZER = OptimizerSettings(3e-3, schedule="cosine", warmup_steps=2, weight_decay=0.01)


class Killed(Exception):
    """The process is gone."""


@dataclass
class Memory:
    """A recorder that keeps everything, and can die or ask to stop right after recording a step."""

    kill_at: int | None = None
    stop_at: int | None = None
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    truncated: list[int] = field(default_factory=list)
    told: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        assert step not in self.steps, f"step {step} is recorded twice"
        self.steps[step] = dict(values)
        if step == self.kill_at:
            raise Killed

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        assert all(value >= 0 for value in values.values())

    def faults(self, step: int, told: Sequence[Mapping[str, Any]]) -> None:
        self.told[step] = [dict(fault) for fault in told]

    def truncate_after(self, step: int) -> None:
        self.truncated.append(step)
        self.steps = {s: v for s, v in self.steps.items() if s <= step}

    def stop_requested(self) -> bool:
        return self.stop_at is not None and max(self.steps, default=0) >= self.stop_at


def varied(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
    """A reward with ties, differences and gaps, from the random text of an untrained policy."""
    return [None if len(c) % 7 == 3 else float(sum(map(ord, c)) % 3) for c in completions]


def sampler(spec: OnPolicy, lm: Any, prompts: int = 4, samples: int = 3, **options: Any) -> GroupSampler:
    encoder = TextEncoder(byte_tokenizer(64), 64)
    texts = ["a", "bc", "a", "def 1", "2+2=", "??"]
    problems = [Problem(t, tuple(encoder.prompt(t)), {"id": i}) for i, t in enumerate(texts)]
    arguments: dict[str, Any] = {
        "rewards": [FunctionReward("varied", varied)],
        "weights": {"varied": 1.0},
        "settings": GroupSettings(prompts, samples, SamplingSettings(6, 0.9)),
        "accelerator": Accelerator(),
    } | options
    return GroupSampler(problems, NativeEngine(lm, small.EOS), encoder, spec=spec, seed=5, **arguments)


def source_of(
    spec: OnPolicy, policy: Policy, reference: Policy | None = None, **options: Any
) -> tuple[ExperienceSource, OnPolicyObjective]:
    objective = OnPolicyObjective(spec, 6, 0.9)
    experts = Demonstrations(small.rows(5, seed=20), 2, 3) if spec.has_expert else None
    drawn = sampler(spec, policy.lm, **options)
    return ExperienceSource(
        spec, policy, reference or small.policy(seed=1), drawn, objective, micro_batch_tokens=60, experts=experts
    ), objective


def options_of(name: str) -> OnPolicy:
    spec = PRESETS[name]
    assert isinstance(spec, OnPolicy)
    if name == "ppo":
        return replace(spec, kl_target=1.0, kl_horizon=100)
    if name == "grpo":
        return replace(spec, minibatches=2)
    if name == "chord":
        return replace(spec, mu_warmup_steps=2, mu_decay_steps=3)
    return spec


def start(
    name: str, folder: Path, recorder: Memory, learning_rate: float = 3e-3, lora: LoraSettings | None = None
) -> torch.nn.Module:
    """Train `name` for STEPS steps, or on from the checkpoint in `folder`. Returns the trained module.

    With `lora` adapters are trained, and the policy without its own is the reference.
    """
    torch.manual_seed(0)
    optimizer = replace(OPTIMIZER, learning_rate=learning_rate)
    source: Any
    if name in ("sft", "reward", "dpo", "grpo_pairs", "kto"):
        made = case(name)
        model, objective = made.model(), made.objective
        for part in ("lm", "model") if lora else ():
            if hasattr(model, part):
                Adapter(getattr(model, part), lora)
        source = EpochSource(made.rows, EpochOrder(len(made.rows), 3, 2, seed=4))
        updates = STEPS
    else:
        spec = options_of(name)
        model = small.policy(critic=spec.has_critic)
        reference = BasePolicy(model.lm, Adapter(model.lm, lora)) if lora else None
        if lora and model.critic is not None:
            Adapter(model.critic, lora)
        source, objective = source_of(spec, model, reference)
        updates = STEPS * spec.epochs * spec.minibatches
    trainer: Trainer[Any] = Trainer(model, optimizer, total_steps=updates, micro_batch_tokens=60)
    fit(trainer, source, objective, LoopSettings(name, STEPS, checkpoint_steps=2), recorder, Checkpoints(folder))
    assert trainer.updates == updates
    return trainer.unwrapped

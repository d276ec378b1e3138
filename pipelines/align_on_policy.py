"""The on-policy branch of the align step: sample, judge, update, for PPO, GRPO and everything between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.common import (
    Made,
    adapted,
    adapter_facts,
    announce,
    model_card,
    optimizer_settings,
    plain_again,
    problems,
    read_table,
    train,
    write_model,
)
from pipelines.rewards import reward_sources
from pipelines.run import Run
from pipelines.sampling import sampling_engine, taken_down
from pipelines.sections import AlignParams, OnPolicyBudget
from posttrain.algorithms import OnPolicy
from posttrain.data.tokens import TextEncoder, table_tokens
from posttrain.models.folders import load_encoder, load_new_scorer, load_policy, load_scorer
from posttrain.models.lora import BasePolicy
from posttrain.models.policy import Policy
from posttrain.rollouts.engine import SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings
from posttrain.training.experience import ExperienceSource, Experts
from posttrain.training.onpolicy import OnPolicyObjective
from posttrain.training.trainer import ParameterGroup, Trainer, trainable

if TYPE_CHECKING:
    from accelerate import Accelerator

START, REWARD = "models/sft", Path("models/reward")


def align(run: Run, name: str, seed: int, device: Accelerator) -> tuple[int, dict[str, float]]:
    """Train on the policy's own answers; returns the number of steps and the last step's metrics."""
    from pipelines.align import folder

    record, budget, params = run.params.algorithm(name), run.params.budget(name), run.params.align
    assert isinstance(record, OnPolicy)
    assert isinstance(budget, OnPolicyBudget)
    encoder = load_encoder(START)
    made = _make(record, params)
    policy = made.model.to(device.device)
    reference = _reference(made, device)
    compute = params.compute
    weights = dict(run.params.algorithms[name].rewards or {})
    sources = reward_sources(run, sorted(weights), device.device, compute)
    asked = problems(encoder, read_table("problems"))
    engine = sampling_engine(run, budget, policy.lm, encoder, START, asked, device, version=lambda: trainer.updates)
    sampler = GroupSampler(
        asked,
        engine,
        encoder,
        sources,
        weights,
        record,
        GroupSettings(
            budget.prompts_per_step,
            budget.samples_per_prompt,
            SamplingSettings(budget.max_new_tokens, budget.temperature),
        ),
        seed,
        device,
    )
    objective = OnPolicyObjective(record, budget.max_new_tokens, budget.temperature)
    experts = _experts(record, encoder, budget, seed)
    source = ExperienceSource(
        record,
        policy,
        reference,
        sampler,
        objective,
        budget=compute.micro_batch_tokens,
        bf16=compute.bf16,
        experts=experts,
        measure_kl_every=budget.measure_kl_every,
    )
    updates = budget.steps * record.epochs * record.minibatches
    trainer: Trainer[Any] = Trainer(
        policy,
        optimizer_settings(budget.optimizer),
        total_steps=updates,
        micro_batch_tokens=compute.micro_batch_tokens,
        groups=_parameter_groups(policy, budget),
        accelerator=device,
    )
    announce(
        run,
        f"{budget.steps} steps of {budget.prompts_per_step} x {budget.samples_per_prompt} answers, {updates} optimiser steps",
    )
    shown = ("reward/total/mean", "kl/ref_k1", "length/mean")
    hook = _Samples(run, source)
    with taken_down(engine):
        last = train(run, trainer, source, objective, budget.steps, shown, params, hook)
    about = {"algorithm": f"{record.name} (arXiv {record.paper})", "seed": seed, "rewards": weights}
    made = plain_again(trainer, made, lambda: _make(record, params))
    card = model_card(run, f"Aligned with {name}", START, about | adapter_facts(params.lora), last)
    write_model(run, made.model.lm, encoder, folder(run), card, made.adapter)
    return budget.steps, last


def _policy(record: OnPolicy) -> Policy:
    lm = load_policy(START)
    if not record.has_critic:
        return Policy(lm)
    if record.critic == "shared":
        return Policy(lm, shared_value_head=True)
    return Policy(lm, critic=load_scorer(REWARD) if record.critic_start == "reward" else load_new_scorer(START))


def _make(record: OnPolicy, params: AlignParams) -> Made[Policy]:
    policy = _policy(record)
    adapter = adapted(policy.lm, params.lora, params.compute)
    if policy.critic is not None:
        adapted(policy.critic, params.lora, params.compute)
    return Made(policy, adapter)


def _reference(made: Made[Policy], device: Accelerator) -> Policy:
    """The supervised model: loaded a second time, or the policy without its adapter."""
    if made.adapter is not None:
        return BasePolicy(made.model.lm, made.adapter)
    return Policy(load_policy(START)).to(device.device).eval().requires_grad_(False)


def _parameter_groups(policy: Policy, budget: OnPolicyBudget) -> list[ParameterGroup]:
    groups = [ParameterGroup("policy", trainable(policy.lm), budget.optimizer.learning_rate)]
    value = policy.critic if policy.critic is not None else policy.value_head
    if value is not None:
        groups.append(ParameterGroup("value", trainable(value), budget.critic_learning_rate))
    return groups


def _experts(record: OnPolicy, encoder: TextEncoder, budget: OnPolicyBudget, seed: int) -> Experts | None:
    if not record.has_expert:
        return None
    rows = [replace(row, id=f"expert {row.id}") for row in table_tokens(encoder, read_table("sft"), "completion")]
    return Experts(rows, budget.prompts_per_step, seed)


class _Samples:
    """Every few steps, a table of what the policy answers."""

    def __init__(self, run: Run, source: ExperienceSource) -> None:
        self.run, self.source = run, source
        self.every, self.shown = run.params.align.samples_every, run.params.align.samples_shown

    def __call__(self, step: int) -> Mapping[str, float]:
        if step == 1 or step % self.every == 0:
            answers = self.source.last_answers[:: self.source.sampler.settings.samples][: self.shown]
            self.run.table(
                "samples",
                step,
                [{"prompt": a.problem.prompt, "completion": a.text, "reward": a.reward, **a.sources} for a in answers],
            )
        return {}

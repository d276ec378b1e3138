"""Run the on-policy branch of the align step: sample, score and update, for PPO, GRPO and their variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.numbers import repeated_prompts
from pipelines.config.schema import AlignParams, OnPolicyBudget
from pipelines.data.tables import expert_rows
from pipelines.runtime.publish import JOURNAL
from pipelines.runtime.recorder import RunRecorder
from pipelines.runtime.run import Run
from pipelines.training.best_checkpoint import best_weights, hooks, restore, split_problems
from pipelines.training.monitor import DivergenceMonitor
from pipelines.training.reward_sources import JudgeTokens, judges_used, reward_sources
from pipelines.training.rollout_engine import closing, sampling_engine
from pipelines.training.rollout_tables import keep_rollouts
from pipelines.training.setup import (
    TrainableModel,
    adapter_facts,
    announce,
    apply_training_options,
    merged_model,
    model_card,
    problems,
    read_table,
    start_folder,
    train,
    with_turns,
    write_model,
)
from posttrain.algorithms import OnPolicy
from posttrain.data.conversations import TrainOn
from posttrain.data.teacher_prompts import SELF
from posttrain.data.tokens import (
    TextEncoder,
    demonstrated_as,
    require_context,
    require_same_vocabulary,
    table_answers,
)
from posttrain.models.folders import load_encoder, load_policy
from posttrain.models.lora import BasePolicy
from posttrain.models.policy import Policy
from posttrain.models.scorers import load_new_scorer, load_scorer, mean_head
from posttrain.models.shards import gathered
from posttrain.rollouts.ahead import Ahead, Background
from posttrain.rollouts.engine import SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings, ScoredAnswer
from posttrain.rollouts.turns import transcript
from posttrain.training.experience import Demonstrations, ExperienceSource
from posttrain.training.onpolicy import OnPolicyObjective
from posttrain.training.sharding import place, shards
from posttrain.training.trainer import ParameterGroup, Trainer, trainable

if TYPE_CHECKING:
    from accelerate import Accelerator

REWARD = Path("models/reward")


def align(run: Run, name: str, seed: int, device: Accelerator, folder: Path) -> tuple[int, dict[str, float]]:
    """Train on the policy's own answers; return the number of steps and the last step's metrics."""
    context = run.context
    spec, budget, params = context.params.algorithm(name), context.params.budget(name), context.params.align
    assert isinstance(spec, OnPolicy)
    assert isinstance(budget, OnPolicyBudget)
    start = start_folder(context.params, name)
    encoder = load_encoder(start)
    made = make_policy(spec, params, start, deferred=shards(device))
    policy = place(made.model, device)
    section = context.params.algorithms[name]
    compute, turns = params.compute, 1 if budget.turns is None else budget.turns.limit
    weights = dict(section.rewards or {})
    limits = context.params.limits.reward_seconds
    sources = reward_sources(context.params.rewards, sorted(weights), device.device, compute, limits)
    most = budget.max_new_tokens * turns
    trained, _ = split_problems(read_table("problems"), params.best_checkpoint)
    training_problems = problems(encoder, trained, section.teacher_prompt, most)
    longest = max(len(problem.teacher_ids or problem.ids) for problem in training_problems) + most
    check_critic(spec, encoder, longest)
    reference = _teacher(section.teacher, encoder, longest, device) or _reference(made, start, device)
    engine = sampling_engine(
        context, name, policy.lm, encoder, start, training_problems, device, version=lambda: trainer.updates
    )
    sampler = GroupSampler(
        training_problems,
        with_turns(engine, encoder, budget.turns),
        encoder,
        sources,
        weights,
        spec,
        GroupSettings(
            budget.prompts_per_step,
            budget.samples_per_prompt,
            SamplingSettings(budget.max_new_tokens, budget.temperature),
            turns,
        ),
        seed,
        device,
        Ahead(engine, budget.rollouts.staleness, budget.steps, budget.rollouts.interrupt)
        if isinstance(engine, Background)
        else None,
    )
    updates = budget.steps * spec.epochs * spec.minibatches
    if budget.prompts_per_step > len(training_problems):
        announce(context, repeated_prompts(name, budget.prompts_per_step, len(training_problems)))
    objective = make_objective(spec, budget)
    experts = _demonstrations(spec, encoder, budget, seed, demonstrated_as(context.params.sft.train_on))
    source = ExperienceSource(
        spec,
        policy,
        reference,
        sampler,
        objective,
        micro_batch_tokens=compute.micro_batch_tokens,
        bf16=compute.bf16,
        experts=experts,
        measure_kl_every=budget.measure_kl_every,
        updates=updates,
    )
    trainer = make_trainer(spec, budget, policy, compute.micro_batch_tokens, device)
    announce(
        context,
        f"{budget.steps} steps of {budget.prompts_per_step} x {budget.samples_per_prompt} answers, {updates} optimiser steps",
    )
    shown = ("kl/ref_k1", "length/mean") if spec.needs_teacher else ("reward/total/mean", "kl/ref_k1", "length/mean")
    watched = context.params.watched_rewards(name) if budget.on_divergence == "stop" else None
    monitor = DivergenceMonitor(context.state / JOURNAL, *watched, device) if watched else None
    judged = JudgeTokens(run.recorder, sources)
    hook = _AfterStep(
        run.recorder, source, params.samples_every, params.samples_shown, monitor, budget.rollouts.keep, judged
    )
    best = best_weights(run, source, trainer, policy, encoder, budget.steps)
    with closing(engine):
        last = train(run, trainer, best or source, objective, budget.steps, shown, params, hooks(hook, best))
    chosen, facts = restore(context, best, trainer)
    judged.record()
    sampler.require_rewarded()
    for line in judges_used(sources):
        announce(context, line)
    about = {"algorithm": f"{spec.name} (arXiv {spec.paper})", "seed": seed, "rewards": weights} | facts
    made = merged_model(trainer, made, lambda: make_policy(spec, params, start))
    card = model_card(context, f"Aligned with {name}", start, about | adapter_facts(params.lora, made.adapter), last)
    write_model(run.outputs, made.model.lm, encoder, folder, card, made.adapter)
    return budget.steps, last | chosen


def _policy(spec: OnPolicy, start: str, deferred: bool) -> Policy:
    """Load the policy, with the critic that the algorithm needs."""
    lm = load_policy(start, deferred)
    if not spec.has_critic:
        return Policy(lm)
    if spec.critic == "shared":
        return Policy(lm, shared_value_head=True)
    if spec.critic_start == "sft":
        return Policy(lm, critic=load_new_scorer(start, deferred))
    require_same_vocabulary(
        load_encoder(REWARD), load_encoder(start), "critic_start: reward, the reward model's tokenizer"
    )
    return Policy(lm, critic=mean_head(load_scorer(REWARD, deferred)))


def check_critic(spec: OnPolicy, encoder: TextEncoder, longest: int) -> None:
    """Raise ConfigError if a critic that starts from the reward model cannot read the longest prompt with its answer."""
    if spec.has_critic and spec.critic != "shared" and spec.critic_start == "reward":
        require_context(load_encoder(REWARD), encoder, longest, "critic_start: reward, the reward model,")


def make_policy(spec: OnPolicy, params: AlignParams, start: str, deferred: bool = False) -> TrainableModel[Policy]:
    """Build the policy with its training options; `deferred` weights stay in their files until the model is split over processes."""
    policy = _policy(spec, start, deferred)
    adapter = apply_training_options(policy.lm, params.lora, params.compute)
    if policy.critic is not None:
        apply_training_options(policy.critic, params.lora, params.compute)
    return TrainableModel(policy, adapter)


def _reference(made: TrainableModel[Policy], start: str, device: Accelerator) -> Policy:
    """Return the model before training: loaded a second time, or the policy without its adapter."""
    if made.adapter is not None:
        with gathered(made.model):
            return BasePolicy(made.model.lm, made.adapter)
    return _frozen(start, device)


def _frozen(source: str, device: Accelerator) -> Policy:
    """Return a policy that is not trained; under FSDP2 each process holds its part."""
    return place(Policy(load_policy(source, shards(device))).requires_grad_(False), device).eval()


def _teacher(source: str | None, encoder: TextEncoder, longest: int, device: Accelerator) -> Policy | None:
    """Return the teacher, which takes the place of the reference, or None if there is none or it is the model before training.

    Args:
        longest: most tokens of a prompt and its answer, which the teacher must be able to read.
    """
    if source is None or source == SELF:
        return None
    own = load_encoder(source)
    require_same_vocabulary(own, encoder, source)
    require_context(own, encoder, longest, source)
    return _frozen(source, device)


def make_objective(spec: OnPolicy, budget: OnPolicyBudget) -> OnPolicyObjective:
    """Return the loss; its length normalisation uses the most tokens that an answer may have."""
    turns = 1 if budget.turns is None else budget.turns.limit
    return OnPolicyObjective(
        spec, budget.max_new_tokens * turns, budget.temperature, staleness=budget.rollouts.staleness
    )


def make_trainer(
    spec: OnPolicy, budget: OnPolicyBudget, policy: Policy, micro_batch_tokens: int, device: Accelerator
) -> Trainer[Any]:
    """Return the trainer of a run."""
    return Trainer(
        policy,
        budget.optimizer.settings(),
        total_steps=budget.steps * spec.epochs * spec.minibatches,
        micro_batch_tokens=micro_batch_tokens,
        groups=_parameter_groups(policy, budget),
        accelerator=device,
    )


def _parameter_groups(policy: Policy, budget: OnPolicyBudget) -> list[ParameterGroup]:
    """Return the optimiser's parameter groups, with a separate learning rate for the value function."""
    groups = [ParameterGroup("policy", trainable(policy.lm), budget.optimizer.learning_rate)]
    value = policy.critic if policy.critic is not None else policy.value_head
    if value is not None:
        groups.append(ParameterGroup("value", trainable(value), budget.critic_learning_rate))
    return groups


def _demonstrations(
    spec: OnPolicy, encoder: TextEncoder, budget: OnPolicyBudget, seed: int, train_on: TrainOn = "completion"
) -> Demonstrations | None:
    """Return the demonstrations of CHORD, or None if the algorithm uses none. With `each`, every answer is one."""
    if not spec.has_expert:
        return None
    shown = table_answers(encoder, expert_rows(read_table("sft")), "completion", train_on)
    rows = [replace(answer, id=f"expert {answer.id}") for answers in shown for answer in answers]
    return Demonstrations(rows, budget.prompts_per_step, seed)


def _shown(answer: ScoredAnswer) -> str:
    """Return the answer, or all turns of a conversation."""
    return transcript(answer.completion.messages) or answer.text


class _AfterStep:
    """Write the answers of every few steps, the step's rollouts and its judges' tokens, and ask the monitor if the run may continue."""

    def __init__(
        self,
        recorder: RunRecorder,
        source: ExperienceSource,
        every: int,
        shown: int,
        monitor: DivergenceMonitor | None,
        keep: str | float,
        judged: JudgeTokens,
    ) -> None:
        self.recorder, self.source, self.every, self.shown = recorder, source, every, shown
        self.monitor, self.keep, self.judged = monitor, keep, judged

    def __call__(self, step: int) -> Mapping[str, float]:
        self.judged.record()
        if step == 1 or step % self.every == 0:
            answers = self.source.last_answers[:: self.source.sampler.settings.samples][: self.shown]
            self.recorder.table(
                "samples",
                step,
                [
                    {"prompt": a.problem.prompt, "completion": _shown(a), "reward": a.reward, **a.sources}
                    for a in answers
                ],
            )
        if self.keep != "none" and self.source.last_batches:
            keep_rollouts(self.recorder, step, self.source, self.keep)
        if self.monitor is not None:
            self.monitor.check(step, self.source.last_answers)
        return {}

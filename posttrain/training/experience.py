"""Turn scored answers into rows of an on-policy update: old and reference log-probabilities, KL in the reward, advantages, demonstrations.

Example:
    Minibatches hold whole groups, here of one answer each:

    >>> [len(part) for part in minibatches(["a", "b", "c"], group_size=1, count=2)]
    [1, 2]
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from posttrain.algorithms.chord import scheduled
from posttrain.algorithms.specs import OnPolicy
from posttrain.data.batches import pad, share_of, shuffled
from posttrain.data.tokens import Tokens
from posttrain.distributed import gather_all
from posttrain.models.inference import TokenLogprobs, token_logprobs
from posttrain.models.policy import Policy
from posttrain.models.shards import gathered
from posttrain.objectives.advantages import group_advantages
from posttrain.objectives.gae import gae, whiten
from posttrain.objectives.kl import adapted_coefficient
from posttrain.objectives.shaping import expert_weight
from posttrain.rollouts.groups import GroupSampler, ScoredAnswer
from posttrain.training.onpolicy import Demonstration, Experience, OnPolicyObjective, OnPolicyRow
from posttrain.training.routing import require_replay
from posttrain.training.source import StepData


@dataclass(frozen=True)
class Demonstrations:
    """The expert stream: `batch` rows for each update, in shuffled epochs."""

    rows: Sequence[Tokens]
    batch: int
    seed: int

    def draw(self, update: int) -> list[Tokens]:
        """Return the rows of one update. They are a pure function of its number, so the optimiser step is the only cursor."""
        drawn = []
        for position in range(update * self.batch, (update + 1) * self.batch):
            epoch, within = divmod(position, len(self.rows))
            drawn.append(self.rows[shuffled(len(self.rows), self.seed, epoch)[within]])
        return drawn


class ExperienceSource:
    """Sample, score and prepare the batches of a step. The state is the sampler's position, the update count and the KL coefficient.

    Args:
        reference: the policy before training, or the teacher if the algorithm has one.
        micro_batch_tokens: most tokens of one forward pass without gradient.
        measure_kl_every: steps between forward passes of the reference if the loss does not need it; 0 for none.
        updates: optimiser steps of the whole run, for schedules that are a share of it.
    """

    def __init__(
        self,
        spec: OnPolicy,
        policy: Policy,
        reference: Policy,
        sampler: GroupSampler,
        objective: OnPolicyObjective,
        *,
        micro_batch_tokens: int,
        bf16: bool = False,
        experts: Demonstrations | None = None,
        measure_kl_every: int = 1,
        updates: int | None = None,
    ) -> None:
        self.spec, self.policy, self.reference, self.sampler, self.objective = (
            spec if updates is None else scheduled(spec, updates),
            policy,
            reference,
            sampler,
            objective,
        )
        if spec.router_replay:
            require_replay(policy)
        self.micro_batch_tokens, self.bf16, self.experts = micro_batch_tokens, bf16, experts
        self.measure_kl_every = measure_kl_every
        self.updates = 0
        self.reported = False
        self.last_answers: list[ScoredAnswer] = []
        self.last_batches: list[Sequence[OnPolicyRow]] = []

    def next(self, step: int) -> StepData[OnPolicyRow]:
        """Return the batches of step `step`, counted from 0, with their metrics."""
        started = time.perf_counter()
        self.last_answers, self.last_batches = [], []
        with gathered(self.policy):
            answers, metrics = self.sampler.sample()
        self.last_answers = answers
        sampled = time.perf_counter()
        with gathered(self.policy):
            rows, measured = self._rows(answers, step)
        self._report_untrained(rows, step)
        metrics |= reward_metrics(answers) | measured
        self.last_batches = batches = self._batches(rows, metrics)
        timings = {"seconds/rollout": sampled - started, "seconds/prepare": time.perf_counter() - sampled}
        return StepData(batches, metrics, timings)

    def _report_untrained(self, rows: Sequence[Experience], step: int) -> None:
        """Print a line at the first step that trains nothing: all its answers are masked."""
        if (
            self.reported
            or self.experts
            or any(row.trained for row in rows)
            or not self.sampler.accelerator.is_main_process
        ):
            return
        self.reported = True
        why = "have no reward, without which a critic is not trained"
        if self.spec.mask_truncated:
            why = (
                "were cut off, and mask_truncated leaves such answers out. If this goes on, nothing is learnt: raise max_new_tokens ="
                f" {self.sampler.settings.sampling.max_new_tokens}, or set options.mask_truncated: false"
            )
        tqdm.write(f"step {step + 1} trains nothing: all its {len(rows)} answers {why}", file=sys.stderr)

    def _rows(self, answers: Sequence[ScoredAnswer], step: int) -> tuple[list[Experience], dict[str, float]]:
        spec, tokens = self.spec, [a.tokens for a in answers]
        measured = spec.needs_reference or (self.measure_kl_every > 0 and step % self.measure_kl_every == 0)
        reference = self._token_logprobs(self.reference, [_read_by_teacher(a) for a in answers]) if measured else None
        # a single update right after sampling has old = its own log-probabilities; all other cases need them stored
        stores_old = (
            spec.epochs * spec.minibatches > 1
            or spec.kl == "reward"
            or spec.kl_target is not None
            or spec.has_critic
            or spec.mismatch != "none"
            or spec.needs_teacher
        )
        self.policy.eval()
        own = self._token_logprobs(self.policy, tokens) if stores_old else None
        advantages, returns, metrics = self._advantages(answers, own, reference)
        rows = [
            Experience(
                tokens=answer.tokens,
                advantages=advantages[i],
                rollout_logprobs=np.asarray(answer.completion.logprobs, dtype=np.float32),
                ref_logprobs=reference[i].logprobs if reference else None,
                old_logprobs=own[i].logprobs if own else None,
                old_routing=own[i].experts if own else None,
                old_values=own[i].values if own and returns is not None else None,
                returns=None if returns is None else returns[i],
                trained=_is_trained(answer, spec),
            )
            for i, answer in enumerate(answers)
        ]
        return rows, metrics

    def _token_logprobs(self, model: Policy, tokens: Sequence[Tokens]) -> list[TokenLogprobs]:
        """Compute log-probabilities; every process computes its share and receives all."""
        return gather_all(
            self.sampler.accelerator,
            tokens,
            lambda own: token_logprobs(model, own, self.micro_batch_tokens, self.objective.temperature, self.bf16),
            partial(share_of, [[t] for t in tokens]),
        )

    def _advantages(
        self,
        answers: Sequence[ScoredAnswer],
        own: Sequence[TokenLogprobs] | None,
        reference: Sequence[TokenLogprobs] | None,
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None, dict[str, float]]:
        spec, lengths = self.spec, [len(a.tokens.response) for a in answers]
        time_steps = max(1, *lengths)
        mask = pad([a.tokens.weights or [1.0] * len(a.tokens.response) for a in answers], time_steps) != 0
        # float32 would make large rewards equal that differ, such as 16777216 and 16777217
        rewards = torch.tensor([a.reward for a in answers], dtype=torch.float64)
        penalty, coefficient = torch.zeros(mask.shape), self.objective.kl_coefficient
        if spec.kl != "none" and own and reference:
            difference = pad([n.logprobs for n in own], time_steps) - pad([n.logprobs for n in reference], time_steps)
            if spec.kl == "reward":
                penalty = coefficient * difference
            self._adapt(float(difference.sum()) / len(answers), len(answers))
        if spec.advantage == "teacher":
            assert own
            assert reference
            advantages = pad([n.logprobs for n in reference], time_steps) - pad([n.logprobs for n in own], time_steps)
            returns, metrics = None, {"advantage/std": float(advantages[mask].std(correction=0))}
        elif spec.advantage == "gae" or spec.advantage == "batch_z":
            values = pad([n.values for n in own], time_steps) if own and spec.has_critic else torch.zeros(mask.shape)
            advantages, returns, metrics = self._token_advantages(rewards, penalty, values, mask)
        else:
            groups = torch.tensor([a.group for a in answers])
            of_answer = group_advantages(rewards - penalty.sum(-1), groups, spec.advantage).float()
            if spec.mask_truncated:
                of_answer = torch.where(_informative_members(answers, spec), of_answer, 0.0)
            advantages, returns, metrics = (
                of_answer[:, None].expand(mask.shape),
                None,
                {"advantage/std": float(of_answer.std(correction=0))},
            )
        if spec.kl != "none":
            # KL in the reward used the coefficient from before this step's KL was known; KL in the loss uses the adapted one
            metrics["kl/coefficient"] = coefficient if spec.kl == "reward" else self.objective.kl_coefficient
        cut = [advantages[i, : lengths[i]].numpy() for i in range(len(answers))]
        return (
            cut,
            None if returns is None else [returns[i, : lengths[i]].numpy() for i in range(len(answers))],
            metrics,
        )

    def _token_advantages(
        self, rewards: Tensor, penalty: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """Return one advantage per token: GAE with the critic, or the reward to go normalised over the batch (2501.03262)."""
        spec, known = self.spec, ~torch.isnan(rewards)
        per_token = -penalty if spec.has_critic else -penalty.double()
        # the last sampled token: the environment's tokens before it have no action, and none follows it
        last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(-1)
        per_token[torch.arange(len(rewards)), last] += torch.where(known, rewards, 0.0)
        scored = mask & known[:, None]
        if spec.has_critic:
            advantages, returns = gae(per_token, values, scored, spec.gamma, spec.lam)
        else:
            advantages, returns = gae(per_token, torch.zeros_like(per_token), scored, 1.0, 1.0)
        metrics = {"advantage/std": float(advantages[scored].std(correction=0))}
        if spec.has_critic:
            residual, spread = (returns - values)[scored].var(correction=0), returns[scored].var(correction=0)
            metrics["value/explained_variance"] = float(1 - residual / spread.clamp(min=1e-12))
        if spec.whiten or not spec.has_critic:
            # GDPO takes mean and deviation over answers (2601.05242); over tokens, groups without a signal would get an advantage
            advantages = whiten(advantages, scored, per_row=spec.reward_combination == "group_normalised").float()
        return advantages, returns if spec.has_critic else None, metrics

    def _adapt(self, kl: float, responses: int) -> None:
        if self.spec.kl_target is not None:
            self.objective.kl_coefficient = adapted_coefficient(
                self.objective.kl_coefficient, kl, self.spec.kl_target, responses, self.spec.kl_horizon
            )

    def _batches(self, rows: Sequence[Experience], metrics: dict[str, float]) -> list[Sequence[OnPolicyRow]]:
        """Return exactly epochs x minibatches batches of whole groups, in the order in which they were drawn."""
        batches: list[Sequence[OnPolicyRow]] = []
        for _ in range(self.spec.epochs):
            for part in minibatches(rows, self.sampler.settings.samples, self.spec.minibatches):
                batches.append(self._with_experts(part, metrics))
                self.updates += 1
        return batches

    def _with_experts(self, rows: Sequence[Experience], metrics: dict[str, float]) -> Sequence[OnPolicyRow]:
        if self.experts is None:
            return rows
        mu = expert_weight(self.updates, self.spec)
        metrics["expert/mu"] = mu
        weighted = [replace(row, weight=1 - mu) for row in rows]
        return [*weighted, *(Demonstration(tokens, mu) for tokens in self.experts.draw(self.updates))]

    def state_dict(self) -> dict[str, Any]:
        return {
            "sampler": self.sampler.state_dict(),
            "updates": self.updates,
            "kl_coefficient": self.objective.kl_coefficient,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.updates, self.objective.kl_coefficient = state["updates"], state["kl_coefficient"]


def minibatches(rows: Sequence[Experience], group_size: int, count: int) -> list[list[Experience]]:
    """Split rows into `count` parts of whole groups, as even as possible. Groups repeat if a filter has left fewer groups than parts."""
    groups = [list(rows[i : i + group_size]) for i in range(0, len(rows), group_size)]
    groups = [groups[i % len(groups)] for i in range(max(count, len(groups)))]
    bounds = [len(groups) * part // count for part in range(count + 1)]
    return [[row for group in groups[low:high] for row in group] for low, high in pairwise(bounds)]


def _read_by_teacher(answer: ScoredAnswer) -> Tokens:
    """Return the answer after the prompt that a teacher reads; a reference policy reads the student's."""
    ids = answer.problem.teacher_ids
    return answer.tokens if ids is None else replace(answer.tokens, prompt=ids)


def _is_trained(answer: ScoredAnswer, spec: OnPolicy) -> bool:
    """Return False for truncated answers if the algorithm masks them, and for unscored answers if there is a critic to mislead."""
    if spec.mask_truncated and not answer.completion.finished:
        return False
    return not (spec.has_critic and math.isnan(answer.reward))


def _informative_members(answers: Sequence[ScoredAnswer], spec: OnPolicy) -> Tensor:
    """Return False [answers] for groups whose trained members all have the same task reward: only shaping would raise equal answers."""
    trained: dict[int, set[float]] = {}
    for answer in answers:
        if _is_trained(answer, spec) and not math.isnan(answer.task):
            trained.setdefault(answer.group, set()).add(answer.task)
    return torch.tensor([len(trained.get(answer.group, ())) > 1 for answer in answers])


def reward_metrics(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Return mean, std and share of missing values of every reward source and of their shaped total, and response lengths."""
    metrics = {
        "length/mean": float(np.mean([a.completion.sampled for a in answers])),
        "length/truncated": float(np.mean([not a.completion.finished for a in answers])),
    }
    columns = {name: [a.sources[name] for a in answers] for name in answers[0].sources}
    columns["total"] = [None if math.isnan(a.reward) else a.reward for a in answers]
    for name, values in columns.items():
        known = [value for value in values if value is not None]
        metrics[f"reward/{name}/mean"] = float(np.mean(known)) if known else math.nan
        metrics[f"reward/{name}/std"] = float(np.std(known)) if known else math.nan
        metrics[f"reward/{name}/missing"] = 1 - len(known) / len(values)
    return metrics

"""Objectives on logged preferences: the DPO family over pairs, and GRPO over logged groups (objectives/preference.py, surrogate.py).

Example:
    >>> centred([1.0, 0.0])
    [0.5, -0.5]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.algorithms.specs import LoggedGroups, Preference
from posttrain.data.batches import TokenBatch, collate, pad
from posttrain.data.tokens import Tokens
from posttrain.errors import DataError
from posttrain.objectives.kl import kl_estimate, kl_metric
from posttrain.objectives.preference import answer_logits, preference_loss
from posttrain.objectives.reduce import aggregate, masked_extremes, masked_sum, row_means, row_sums
from posttrain.objectives.surrogate import importance_ratio, surrogate_loss
from posttrain.training.routing import add_routing
from posttrain.training.sums import Terms


@dataclass(frozen=True)
class Answer:
    """A logged response with the reference's log-probability of each token, [time] (zeros without a reference)."""

    tokens: Tokens
    ref_logprobs: np.ndarray


@dataclass(frozen=True)
class PreferencePair:
    """A pair of answers; `score_gap` = chosen_score - rejected_score, or 0 if the table has no scores."""

    chosen: Answer
    rejected: Answer
    score_gap: float = 0.0


@dataclass(frozen=True)
class AnswerGroup:
    """Answers to one prompt with their scores; a pair without scores is (0.5, -0.5) up to a shift."""

    answers: tuple[Answer, ...]
    scores: tuple[float, ...]


class PreferenceObjective:
    """One loss and one logit per pair; chosen and rejected share one forward pass."""

    def __init__(self, spec: Preference) -> None:
        self.spec = spec

    def sequences(self, row: PreferencePair) -> Sequence[Tokens]:
        return (row.chosen.tokens, row.rejected.tokens)

    def counts(self, rows: Sequence[PreferencePair]) -> Mapping[str, float]:
        weighted = self.spec.score_weighting == "weight"
        return {
            "pairs": float(len(rows)),
            # weights are normalised to mean 1 over the step's pairs
            "pair_weight": float(sum(abs(row.score_gap) for row in rows)) if weighted else float(len(rows)),
            "chosen_tokens": float(sum(row.chosen.tokens.loss_tokens for row in rows)),
        }

    def terms(self, model: nn.Module, rows: Sequence[PreferencePair]) -> Terms:
        device = next(model.parameters()).device
        answers = [row.chosen for row in rows] + [row.rejected for row in rows]
        gaps = torch.tensor([row.score_gap for row in rows], dtype=torch.float64)
        batch, columns = with_reference(answers, {"score_gap": gaps}, device)
        output, reference = model(batch), columns["reference"]
        ratio = answer_logits(output.logprobs, reference, batch.mask, self.spec)
        difference = ratio[: len(rows)] - ratio[len(rows) :]
        gap = columns["score_gap"].to(difference.dtype)
        loss = preference_loss(difference, gap, self.spec)
        weight = gap.abs() if self.spec.score_weighting == "weight" else torch.ones_like(gap)
        chosen_mask = batch.mask[: len(rows)]
        rewards = self.spec.beta * ratio
        terms = Terms(
            losses={"pairs": ((weight * loss).sum(), "pair_weight", self.spec.pair_coefficient)},
            metrics={
                "preference/accuracy": ((difference > 0).float().sum(), "pairs"),
                "preference/margin": (self.spec.beta * difference.sum(), "pairs"),
                "preference/chosen_reward": (rewards[: len(rows)].sum(), "pairs"),
                "preference/rejected_reward": (rewards[len(rows) :].sum(), "pairs"),
                "entropy": (masked_sum(output.entropy[: len(rows)], chosen_mask), "chosen_tokens"),
            },
        )
        if self.spec.nll_coefficient:
            nll = -row_means(output.logprobs[: len(rows)], chosen_mask).sum()
            terms.losses["nll"] = (nll, "pairs", self.spec.nll_coefficient)
            terms.metrics["preference/chosen_nll"] = (nll, "pairs")
        add_routing(terms, output.routing and output.routing[: len(rows)], chosen_mask, "chosen_tokens")
        return terms


class LoggedGroupsObjective:
    """The clipped surrogate of GRPO with `old` fixed to the reference, plus beta * KL to the reference."""

    def __init__(self, spec: LoggedGroups) -> None:
        self.spec = spec

    def sequences(self, row: AnswerGroup) -> Sequence[Tokens]:
        return [answer.tokens for answer in row.answers]

    def counts(self, rows: Sequence[AnswerGroup]) -> Mapping[str, float]:
        answers = [a for row in rows for a in row.answers]
        return {
            "sequences": float(len(answers)),
            "tokens": float(sum(a.tokens.loss_tokens for a in answers)),
            "groups": float(len(rows)),
        }

    def terms(self, model: nn.Module, rows: Sequence[AnswerGroup]) -> Terms:
        spec, device = self.spec, next(model.parameters()).device
        answers = [a for row in rows for a in row.answers]
        added = {
            "advantages": torch.tensor([a for row in rows for a in centred(row.scores)]),
            "ends": _best_and_worst(rows),
        }
        batch, columns = with_reference(answers, added, device)
        output, reference, advantages = model(batch), columns["reference"], columns["advantages"]
        ratio = importance_ratio(output.logprobs, reference, batch.mask, spec.ratio)
        surrogate = surrogate_loss(ratio, output.logprobs, advantages[:, None], spec.clip_low, spec.clip_high)
        kl = kl_estimate(output.logprobs, reference, spec.kl_estimator)
        loss = surrogate.loss + spec.kl_coefficient * kl
        terms = Terms(
            losses={"policy": (aggregate(loss, batch.mask, "sequence_mean", 0), "sequences", 1.0)},
            metrics={
                "clip/low": (masked_sum(surrogate.clipped_low.float(), batch.mask), "tokens"),
                "clip/high": (masked_sum(surrogate.clipped_high.float(), batch.mask), "tokens"),
                "kl/ref_k1": (masked_sum(output.logprobs - reference, batch.mask), "sequences"),
                "kl/ref_k3": (masked_sum(kl_metric(output.logprobs, reference), batch.mask), "sequences"),
                "ratio/mean": (masked_sum(ratio, batch.mask), "tokens"),
                "entropy": (masked_sum(output.entropy, batch.mask), "tokens"),
                "preference/accuracy": (
                    _ranked_share(row_sums(output.logprobs - reference, batch.mask), columns["ends"]),
                    "groups",
                ),
            },
        )
        if len(batch.trained):
            terms.extremes["ratio/min"], terms.extremes["ratio/max"] = masked_extremes(ratio.detach(), batch.mask)
        add_routing(terms, output.routing, batch.mask, "tokens")
        return terms


def centred(group_scores: Sequence[float]) -> list[float]:
    """Return A = s - mean(s)."""
    mean = sum(group_scores) / len(group_scores)
    return [score - mean for score in group_scores]


def bounded_advantages(ranked: Sequence[AnswerGroup]) -> list[AnswerGroup]:
    """Return the groups with scores divided by one number if their mean |advantage| is above 1/2, the one of pairs without scores.

    Grades from 1 to 10 would else weigh ten times as much against the KL term as grades from 0 to 1.
    """
    deviations = [abs(advantage) for group in ranked for advantage in centred(group.scores)]
    scale = 2 * sum(deviations) / len(deviations)
    return list(ranked) if scale <= 1 else [replace(g, scores=tuple(s / scale for s in g.scores)) for g in ranked]


def ranked_groups(
    pairs: Sequence[tuple[Answer, Answer]], scores: Sequence[tuple[float, float]] | None
) -> list[AnswerGroup]:
    """Return each pair as a group; with scores, all pairs of a prompt form one ranked list of their distinct answers.

    An answer with several scores gets their mean. Scores of the whole table are bounded together.

    Raises:
        DataError: a list has only one answer.
    """
    if scores is None:
        return [AnswerGroup(pair, (0.5, -0.5)) for pair in pairs]
    keyed = sorted(range(len(pairs)), key=lambda i: (pairs[i][0].tokens.prompt, i))
    ranked = []
    for _, members in groupby(keyed, key=lambda i: pairs[i][0].tokens.prompt):
        distinct: dict[tuple[int, ...], Answer] = {}
        given: dict[tuple[int, ...], list[float]] = {}
        row = ""
        for i in members:
            for answer, score in zip(pairs[i], scores[i], strict=True):
                row, response = answer.tokens.id, answer.tokens.response
                distinct.setdefault(response, answer)
                given.setdefault(response, []).append(score)
        if len(distinct) < 2:
            raise DataError(
                f"preference row {row}: all answers to its prompt are the same, and a group of one has no baseline;"
                " remove the row, or set validation.rules.identical_pair: quarantine"
            )
        ranked.append(AnswerGroup(tuple(distinct.values()), tuple(sum(s) / len(s) for s in given.values())))
    return bounded_advantages(ranked)


def with_reference(
    answers: Sequence[Answer], columns: dict[str, Tensor], device: torch.device
) -> tuple[TokenBatch, dict[str, Tensor]]:
    """Return the batch of the answers and the columns on `device`, with the reference's log-probabilities [batch, time]."""
    laid_out = collate([answer.tokens for answer in answers])
    reference = pad([answer.ref_logprobs for answer in answers], laid_out.mask.shape[1])
    return laid_out.with_columns({"reference": reference, **columns}, device)


def _best_and_worst(rows: Sequence[AnswerGroup]) -> Tensor:
    """Return the indices of each group's best-scored and worst-scored answers, [2, groups]."""
    best, worst, start = [], [], 0
    for row in rows:
        best.append(start + row.scores.index(max(row.scores)))
        worst.append(start + row.scores.index(min(row.scores)))
        start += len(row.answers)
    return torch.tensor([best, worst])


def _ranked_share(log_ratios: Tensor, ends: Tensor) -> Tensor:
    """Return the number of groups whose best-scored answer has gained more log-probability than the worst-scored one."""
    return (log_ratios.index_select(0, ends[0]) > log_ratios.index_select(0, ends[1])).float().sum()

"""One loss for pairs: the reward model, and the DPO family by link, target, weight and offset."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from posttrain.algorithms.specs import Preference


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor, target: Tensor, center: float) -> Tensor:
    """Per-pair loss [pairs] of a reward model, with x = r_w - r_l - margin and p = target, the probability that `chosen` is better:

    -p log sigma(x) - (1-p) log sigma(-x) + center * (r_w + r_l)^2 (2312.09244). All tensors [pairs].
    """
    return logistic(chosen - rejected - margin, target) + center * (chosen + rejected).square()


def preference_loss(difference: Tensor, score_gap: Tensor, spec: Preference) -> Tensor:
    """Per-pair loss [pairs], before the pair weight.

    difference: [pairs] (log-ratio of chosen) - (log-ratio of rejected), of sums or of means as `record.logit` says.
    score_gap: [pairs] chosen_score - rejected_score, used by the score weightings alone.
    """
    if spec.link == "square":
        return (difference - 1 / (2 * spec.beta)).square()
    logit = spec.beta * difference - spec.target_margin
    if spec.score_weighting == "offset":
        logit = logit - spec.score_scale * score_gap
    if spec.link == "hinge":
        smoothing = spec.label_smoothing
        wrong = relu(1 + logit)
        if spec.robust:
            return ((1 - smoothing) * relu(1 - logit) - smoothing * wrong) / (1 - 2 * smoothing)
        return (1 - smoothing) * relu(1 - logit) + smoothing * wrong
    if spec.robust:
        smoothing = spec.label_smoothing
        return ((1 - smoothing) * -logsigmoid(logit) + smoothing * logsigmoid(-logit)) / (1 - 2 * smoothing)
    return logistic(logit, preference_target(score_gap, spec))


def preference_target(score_gap: Tensor, spec: Preference) -> Tensor:
    """Probability [pairs] that the chosen answer is the better one: 1 - label_smoothing, or sigma(eta * score gap)."""
    if spec.score_weighting == "soft":
        return torch.sigmoid(spec.score_scale * score_gap)
    return torch.full_like(score_gap, 1 - spec.label_smoothing)


def logistic(logit: Tensor, target: Tensor) -> Tensor:
    """-p log sigma(x) - (1-p) log sigma(-x), same shape as `logit`."""
    return -target * logsigmoid(logit) - (1 - target) * logsigmoid(-logit)

"""The policy loss of an on-policy algorithm: the ratio and the surrogate that its spec names.

Example:
    At ratio 1 every surrogate has the gradient of -A log p:

    >>> import torch
    >>> from posttrain.algorithms import PRESETS
    >>> old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> for name in ("grpo", "cispo", "sapo", "dppo_tv"):
    ...     logprobs = old.clone().requires_grad_()
    ...     surrogate, _ = policy_loss(PRESETS[name], logprobs, old, torch.full((1, 2), 0.5), mask)
    ...     surrogate.loss.sum().backward()
    ...     print(name, logprobs.grad.tolist())
    grpo [[-0.5, -0.5]]
    cispo [[-0.5, -0.5]]
    sapo [[-0.5, -0.5]]
    dppo_tv [[-0.5, -0.5]]
"""

from __future__ import annotations

from torch import Tensor

from posttrain.algorithms.specs import OnPolicy
from posttrain.objectives.surrogate import SurrogateLoss, importance_ratio, surrogate_loss
from posttrain.objectives.trust_region import divergence_loss, geometric_loss, soft_gate_loss


def policy_loss(
    spec: OnPolicy, logprobs: Tensor, anchor: Tensor, advantages: Tensor, loss_mask: Tensor
) -> tuple[SurrogateLoss, Tensor]:
    """Return the surrogate loss and the ratios to `anchor`; all tensors are [batch, time].

    Args:
        anchor: log-probabilities of the policy in the ratio's denominator.
    """
    ratio, kind = importance_ratio(logprobs, anchor, loss_mask, spec.ratio), spec.surrogate
    if kind == "soft":
        return soft_gate_loss(ratio, advantages, spec.tau_positive, spec.tau_negative), ratio
    if kind == "geometric":
        return geometric_loss(logprobs, anchor, advantages, loss_mask, spec.clip_low, spec.clip_high), ratio
    if kind == "tv" or kind == "kl":
        return divergence_loss(logprobs, anchor, advantages, kind, spec.clip_low, spec.clip_high), ratio
    clips = (spec.clip_low, spec.clip_high, kind, spec.dual_clip)
    return surrogate_loss(ratio, logprobs, advantages, *clips), ratio

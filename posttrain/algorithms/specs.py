"""The design space of post-training algorithms as frozen records.

An algorithm is a point in this space: data, not code. This module imports neither torch nor transformers, so that a configuration can be
checked without them.

Example:
    A variant of a preset is a replaced field:

    >>> from dataclasses import replace
    >>> from posttrain.algorithms.grpo import GRPO
    >>> replace(GRPO, aggregate="constant").aggregate
    'constant'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RewardCombination = Literal["sum", "group_normalised"]
Advantage = Literal["gae", "group_mean", "group_z", "leave_one_out", "batch_z"]
GroupAdvantage = Literal["group_mean", "group_z", "leave_one_out"]
Ratio = Literal["token", "sequence"]
Surrogate = Literal["clip", "weight"]
Aggregate = Literal["token_mean", "sequence_mean", "constant"]
KlPlace = Literal["none", "reward", "loss"]
KlEstimator = Literal["k1", "k2", "k3"]
Filter = Literal["none", "drop", "refill"]
Mismatch = Literal["none", "truncate", "mask"]
Critic = Literal["separate", "shared"]
CriticStart = Literal["reward", "sft"]
Phi = Literal["none", "p_one_minus_p"]


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """An algorithm that samples from the policy it trains.

    L = (1-mu) * Agg_tokens[w * S(rho, A) + beta * KL] + mu * Agg_expert[phi(p) * (-log p)]
    """

    name: str
    paper: str
    advantage: Advantage
    aggregate: Aggregate
    ratio: Ratio = "token"
    surrogate: Surrogate = "clip"
    """clip: the pessimistic minimum of PPO. weight: sg[clip(rho)] * A * log p (CISPO), which keeps the gradient of clipped tokens."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: KlPlace = "none"
    kl_estimator: KlEstimator = "k3"
    kl_coefficient: float = 0.0
    kl_target: float | None = None
    """Mean KL per response (nats) that an adaptive coefficient steers to; None keeps the coefficient fixed."""
    kl_horizon: int = 1000
    """Responses over which the adaptive coefficient changes by at most a fifth (1909.08593)."""
    reward_combination: RewardCombination = "sum"
    """group_normalised: each reward is normalised within its group before the weighted sum (GDPO, 2601.05242).

    With advantage 'batch_z' the sum is normalised over the batch, as in the paper. 'group_z' would undo it and is refused.
    """
    filter: Filter = "none"
    refill_limit: int = 8
    """Most rounds of sampling per step, including the first one."""
    refill_partial: bool = False
    """At the limit: False stops with an error, True trains on the groups found so far and reports their number."""
    missing_eos_penalty: float = 0.0
    overlong_share: float = 0.0
    """Share of max_new_tokens, before the limit, over which the soft overlong penalty grows to -1; 0 turns it off."""
    mask_truncated: bool = False
    mismatch: Mismatch = "none"
    mismatch_cap: float = 2.0
    mu_peak: float = 0.0
    """Largest weight of the expert stream; 0 means there is no expert stream."""
    mu_valley: float = 0.0
    """Final weight of the expert stream; equal to mu_peak for a constant weight."""
    mu_warmup_steps: int = 0
    mu_decay_steps: int | None = 0
    """Optimiser steps of the decay, after the warm-up's. None: three quarters of the run's, whatever its length."""
    phi: Phi = "none"
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = False
    value_clip: float = 0.2
    value_coefficient: float = 0.5
    critic: Critic = "separate"
    critic_start: CriticStart = "reward"
    """Start of a separate critic: the reward model, or the supervised model with a value head of zeros."""
    epochs: int = 1
    """Passes over a rollout, in `minibatches` updates each. With one update in total the ratio is 1 and the clip has no effect."""
    minibatches: int = 1

    @property
    def has_critic(self) -> bool:
        """Return True if advantages need a critic."""
        return self.advantage == "gae"

    @property
    def has_expert(self) -> bool:
        """Return True if there is an expert stream."""
        return self.mu_peak > 0

    @property
    def needs_reference(self) -> bool:
        """Return True if the objective uses the reference policy."""
        return self.kl != "none"


@dataclass(frozen=True, kw_only=True)
class Preference:
    """An algorithm that learns from pairs without sampling.

    L = pair_coefficient * pair loss + nll_coefficient * NLL of the chosen answer, with the pair loss
    logit {sum, mean, odds} x link {logistic, hinge, square} x target {1, 1-eps, sigma(eta ds)} x weight {1, |ds|} x offset {0, alpha ds}
    """

    name: str
    paper: str
    beta: float = 0.1
    logit: Literal["sum", "mean", "odds"] = "sum"
    """Log-ratio of an answer: sum or mean over its tokens. odds: log(p / (1 - p)) of the mean, without a reference (2403.07691)."""
    link: Literal["logistic", "hinge", "square"] = "logistic"
    reference: bool = True
    label_smoothing: float = 0.0
    robust: bool = False
    """Divide out the expected effect of label noise `label_smoothing` (2403.00409)."""
    score_weighting: Literal["none", "soft", "weight", "offset"] = "none"
    score_scale: float = 1.0
    """eta of `soft`, alpha of `offset`."""
    target_margin: float = 0.0
    """gamma of SimPO: the margin that is subtracted from the logit."""
    nll_coefficient: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood: 1 in ORPO, and in DPO for reasoning (2404.19733)."""
    pair_coefficient: float = 1.0
    """Weight of the pair loss next to the NLL: lambda of ORPO."""
    epochs: int = 1

    @property
    def needs_reference(self) -> bool:
        """Return True if the objective uses the reference policy."""
        return self.reference


@dataclass(frozen=True, kw_only=True)
class LoggedGroups:
    """Relative policy optimisation over logged answers: a pair or ranked list is a group, and `old` is the reference."""

    name: str
    paper: str
    ratio: Ratio = "sequence"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.04
    kl_estimator: KlEstimator = "k3"
    epochs: int = 1

    @property
    def needs_reference(self) -> bool:
        """Return True: `old` is the reference policy."""
        return True


@dataclass(frozen=True, kw_only=True)
class Unpaired:
    """An algorithm that learns from single answers with a label, thumbs up or down, without sampling."""

    name: str
    paper: str
    beta: float = 0.1
    desirable_weight: float = 1.0
    """Weight of an answer with thumbs up. Over a table, weight x number should be 1 to 1.33 times that of thumbs down (2402.01306)."""
    undesirable_weight: float = 1.0
    epochs: int = 1

    @property
    def needs_reference(self) -> bool:
        """Return True: answers are compared with the reference policy."""
        return True


Algorithm = OnPolicy | Preference | LoggedGroups | Unpaired

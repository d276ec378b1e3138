"""The design space of post-training algorithms as frozen records.

An algorithm is a point in this space: data, not code. A neighbour of a preset is `replace(GRPO, aggregate="constant")`.
This module imports neither torch nor transformers, so that a configuration can be checked anywhere.
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
    """clip: the pessimistic minimum of PPO. weight: sg[clip(rho)] * A * log p (CISPO), gradient kept where clipped."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: KlPlace = "none"
    kl_estimator: KlEstimator = "k3"
    kl_coefficient: float = 0.0
    kl_target: float | None = None
    """Mean KL per response (nats) that an adaptive coefficient steers to; None keeps the coefficient fixed."""
    kl_horizon: int = 1000
    """The adaptive coefficient changes by a fifth of itself at most over so many responses (1909.08593)."""
    reward_combination: RewardCombination = "sum"
    """group_normalised: each reward is normalised within its group before the weighted sum (2601.05242)."""
    filter: Filter = "none"
    refill_limit: int = 8
    """Rounds of sampling per step at most, the first one included."""
    refill_partial: bool = False
    """At the limit: False stops with an error, True trains on the groups there are and says so."""
    missing_eos_penalty: float = 0.0
    overlong_cache: int = 0
    """Tokens before the length limit over which the soft overlong penalty grows to -1; 0 switches it off."""
    mask_truncated: bool = False
    mismatch: Mismatch = "none"
    mismatch_cap: float = 2.0
    mu_peak: float = 0.0
    """Weight of the expert stream at its highest; 0 means there is no expert stream."""
    mu_valley: float = 0.0
    """Where it ends; equal to mu_peak for a constant weight."""
    mu_warmup_steps: int = 0
    mu_decay_steps: int = 0
    """Optimiser steps, as the warm-up's."""
    phi: Phi = "none"
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = False
    value_clip: float = 0.2
    value_coefficient: float = 0.5
    critic: Critic = "separate"
    critic_start: CriticStart = "reward"
    """What a separate critic starts from: the reward model, or the supervised model with a value head of zeros."""
    epochs: int = 1
    """Passes over a rollout, in `minibatches` updates each. With one update in all the ratio is 1, and no clip ever acts."""
    minibatches: int = 1

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def has_expert(self) -> bool:
        return self.mu_peak > 0

    @property
    def needs_reference(self) -> bool:
        return self.kl != "none"


@dataclass(frozen=True, kw_only=True)
class Preference:
    """An algorithm that learns from pairs without sampling.

    logit {sum, mean} x link {logistic, hinge, square} x target {1, 1-eps, sigma(eta ds)} x weight {1, |ds|} x offset {0, alpha ds}
    """

    name: str
    paper: str
    beta: float = 0.1
    logit: Literal["sum", "mean"] = "sum"
    link: Literal["logistic", "hinge", "square"] = "logistic"
    reference: bool = True
    label_smoothing: float = 0.0
    robust: bool = False
    """Divide out the expected effect of label noise `label_smoothing` (2403.00409)."""
    score_weighting: Literal["none", "soft", "weight", "offset"] = "none"
    score_scale: float = 1.0
    """eta of `soft`, alpha of `offset`."""
    target_margin: float = 0.0
    """gamma of SimPO: the margin that is taken from the logit."""
    epochs: int = 1

    @property
    def needs_reference(self) -> bool:
        return self.reference


@dataclass(frozen=True, kw_only=True)
class LoggedGroups:
    """Relative policy optimisation over logged answers: a pair or ranked list is a group, `old` is the reference."""

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
        return True


Algorithm = OnPolicy | Preference | LoggedGroups

"""The record of algorithms that sample from the policy that they train.

Example:
    >>> OnPolicy(name="mine", paper="-", advantage="group_z", aggregate="token_mean").has_critic
    False
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.algorithms.axes import (
    Advantage,
    Aggregate,
    Anchor,
    Critic,
    CriticStart,
    Filter,
    KlEstimator,
    KlPlace,
    Mismatch,
    Phi,
    Ratio,
    RewardCombination,
    Surrogate,
)


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
    """clip: the pessimistic minimum of PPO. weight: sg[clip(rho)] * A * log p (CISPO), which keeps the gradient of clipped tokens.

    soft: a sigmoid gate (SAPO). geometric: the geometric mean of clipped ratios (GMPO). tv, kl: no token leaves a trust region (DPPO).
    """
    anchor: Anchor = "old"
    """Denominator of the ratio: the policy before the update as the trainer computes it, or as the sampler reported it (rollout)."""
    clip_low: float = 0.2
    """Widths of the clip: of rho with clip and weight, of log rho with geometric; with tv and kl the limits of the divergence."""
    clip_high: float = 0.2
    dual_clip: float | None = None
    """Largest loss of a token with A < 0, in units of |A| (1912.09729); above 1, usually 3. None: no bound, as in PPO."""
    tau_positive: float = 1.0
    """Steepness of the soft gate for tokens with A > 0, and A < 0."""
    tau_negative: float = 1.05
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus: the loss of each token falls by this times the entropy of its distribution, in nats (1602.01783)."""
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
    """Correction for a sampler that differs from the trainer, by the ratio w = exp(old - rollout) of a token, or seq_: of a whole answer.

    truncate: min(w, cap). mask: w inside [1/cap, cap], 0 outside (IcePop).
    """
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
    router_replay: bool = False
    """Mixture of experts: every update of a rollout routes its response tokens as the policy before the first one did (2507.18071)."""

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
        """Return True if the objective uses the reference policy; a teacher takes its place."""
        return self.kl != "none" or self.needs_teacher

    @property
    def needs_teacher(self) -> bool:
        """Return True if advantages come from a teacher's log-probabilities, not from rewards."""
        return self.advantage == "teacher"

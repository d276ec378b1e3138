"""The records of algorithms that learn from logged answers: pairs, groups, and single answers with a label.

Example:
    >>> Preference(name="mine", paper="-", reference=False).needs_reference
    False
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posttrain.algorithms.axes import KlEstimator, Ratio


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

"""GMPO (arXiv 2507.20673): GRPO with the geometric mean of the tokens' ratios, each clipped to exp(-0.4) ... exp(0.4) before.

Single tokens with an extreme ratio move a geometric mean less than an arithmetic one, so the clip can be wider.

Example:
    >>> GMPO.surrogate, GMPO.clip_low, GMPO.clip_high
    ('geometric', 0.4, 0.4)
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

GMPO = replace(
    GRPO,
    name="gmpo",
    paper="2507.20673",
    advantage="group_z",
    surrogate="geometric",
    clip_low=0.4,
    clip_high=0.4,
    kl="none",
    kl_coefficient=0.0,
    minibatches=4,
)

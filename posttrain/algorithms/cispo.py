"""CISPO (arXiv 2506.13585): clip the importance weight, not the update. Clipped tokens keep their gradient.

A rollout is used for four updates (16 in the paper), because every weight is 1 in the first one. There is no lower bound:
1 - clip_low is 0.

Example:
    >>> CISPO.surrogate, CISPO.clip_high, CISPO.minibatches
    ('weight', 0.28, 4)
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

CISPO = replace(
    GRPO,
    name="cispo",
    paper="2506.13585",
    advantage="group_z",
    surrogate="weight",
    clip_low=1.0,
    clip_high=0.28,
    aggregate="token_mean",
    kl="none",
    kl_coefficient=0.0,
    minibatches=4,
)

"""RLOO (arXiv 2402.14740): REINFORCE with KL in the reward; a response's baseline is the mean reward of the *other* responses.

A response is one action: its log-probability is the sum over its tokens, so every sum is divided by one constant and not by its length.

Example:
    >>> RLOO.advantage, RLOO.aggregate
    ('leave_one_out', 'constant')
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

RLOO = replace(
    GRPO,
    name="rloo",
    paper="2402.14740",
    advantage="leave_one_out",
    aggregate="constant",
    kl="reward",
    kl_estimator="k1",
    kl_coefficient=0.05,
)

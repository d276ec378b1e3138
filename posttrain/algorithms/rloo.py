"""RLOO (arXiv 2402.14740): the baseline of a response is the mean reward of the *other* responses; REINFORCE with KL in the reward.

A response is one action: its log-probability is the sum over its tokens, so that every sum is divided by one constant and no length.
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

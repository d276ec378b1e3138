"""RLOO (arXiv 2402.14740): the baseline of a response is the mean reward of the *other* responses; REINFORCE with KL in the reward."""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

RLOO = replace(
    GRPO,
    name="rloo",
    paper="2402.14740",
    advantage="leave_one_out",
    kl="reward",
    kl_estimator="k1",
    kl_coefficient=0.05,
)

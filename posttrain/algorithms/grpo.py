"""GRPO: group-relative policy optimisation (arXiv 2402.03300), with A = R - mean(R).

The baseline of a response is the mean reward of its group, so no critic is needed. `advantage="group_z"` also divides by the group's
standard deviation, as in the paper.

Example:
    >>> GRPO.advantage, GRPO.kl_coefficient, GRPO.has_critic
    ('group_mean', 0.04, False)
"""

from posttrain.algorithms.specs import OnPolicy

GRPO = OnPolicy(
    name="grpo",
    paper="2402.03300",
    advantage="group_mean",
    aggregate="sequence_mean",
    kl="loss",
    kl_estimator="k3",
    kl_coefficient=0.04,
)

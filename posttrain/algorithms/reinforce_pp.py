"""REINFORCE++ (arXiv 2501.03262): no critic and no groups; per-token KL in the reward, advantages normalised over the whole batch.

Example:
    >>> REINFORCE_PP.advantage, REINFORCE_PP.kl
    ('batch_z', 'reward')
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

REINFORCE_PP = replace(
    GRPO,
    name="reinforce_pp",
    paper="2501.03262",
    advantage="batch_z",
    aggregate="token_mean",
    kl="reward",
    kl_estimator="k1",
    kl_coefficient=0.01,
)

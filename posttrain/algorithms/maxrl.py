"""MaxRL (arXiv 2602.02710): the gradient of log(success rate) in place of the success rate, so that hard prompts count more.

With A = (R - mean) / mean, the sum over a group is the mean score function of its right answers, centred. More samples per prompt come
closer to maximum likelihood. An answer is one action, so one constant divides the sum over its tokens. Rewards must not be negative.

Example:
    >>> MAXRL.advantage, MAXRL.aggregate
    ('group_rate', 'constant')
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

MAXRL = replace(
    GRPO,
    name="maxrl",
    paper="2602.02710",
    advantage="group_rate",
    aggregate="constant",
    kl="none",
    kl_coefficient=0.0,
)

"""DAPO (arXiv 2503.14476): GRPO with a higher upper clip, a mean over tokens, and only groups that carry a signal.

Groups of equal rewards are replaced by further prompts (dynamic sampling). Truncated answers are masked, long ones get a soft penalty.
A rollout is used for four updates (16 in the paper), because the clip has no effect in the first one. Groups are compared by the task's
reward, before shaping by length. The penalty grows over the last fifth of the length limit, as in the paper (4,096 of 20,480 tokens).

Example:
    >>> DAPO.clip_low, DAPO.clip_high, DAPO.filter
    (0.2, 0.28, 'refill')
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

DAPO = replace(
    GRPO,
    name="dapo",
    paper="2503.14476",
    advantage="group_z",
    clip_low=0.2,
    clip_high=0.28,
    aggregate="token_mean",
    kl="none",
    kl_coefficient=0.0,
    filter="refill",
    overlong_share=0.2,
    mask_truncated=True,
    minibatches=4,
)

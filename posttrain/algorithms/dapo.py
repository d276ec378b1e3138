"""DAPO (arXiv 2503.14476): GRPO, but a higher upper clip, a mean over tokens, and only groups that carry a signal.

Groups of equal rewards are replaced by further prompts (dynamic sampling); truncated answers are masked, long ones shaped softly.
A rollout serves four updates (16 in the paper), since no clip acts in the first one. Equal is meant of the shaped reward, which the
advantage is made of, where the paper compares correctness alone.
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
    overlong_cache=8,
    mask_truncated=True,
    minibatches=4,
)

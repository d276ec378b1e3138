"""CISPO (arXiv 2506.13585): clip the importance weight, not the update. Clipped tokens keep their gradient."""

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
)

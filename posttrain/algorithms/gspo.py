"""GSPO (arXiv 2507.18071): GRPO, but one length-normalised importance ratio per sequence, clipped in a band of its own width.

The ratio of a whole sequence tolerates single tokens whose experts changed, which is why it suits mixture-of-experts policies.
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

GSPO = replace(
    GRPO,
    name="gspo",
    paper="2507.18071",
    advantage="group_z",
    ratio="sequence",
    clip_low=3e-4,
    clip_high=4e-4,
    kl="none",
    kl_coefficient=0.0,
    minibatches=4,
)

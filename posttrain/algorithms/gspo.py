"""GSPO (arXiv 2507.18071): GRPO with one length-normalised importance ratio per sequence, and its own clip widths.

The ratio of a whole sequence tolerates single tokens whose experts changed, so it suits mixture-of-experts policies.

Example:
    >>> GSPO.ratio, GSPO.clip_low, GSPO.clip_high
    ('sequence', 0.0003, 0.0004)
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

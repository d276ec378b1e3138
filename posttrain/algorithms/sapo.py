"""SAPO (arXiv 2511.20347): GRPO with a smooth gate in place of the clip, steeper for tokens with a negative advantage.

Example:
    >>> SAPO.surrogate, SAPO.tau_positive, SAPO.tau_negative
    ('soft', 1.0, 1.05)
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

SAPO = replace(
    GRPO,
    name="sapo",
    paper="2511.20347",
    advantage="group_z",
    surrogate="soft",
    kl="none",
    kl_coefficient=0.0,
    minibatches=4,
)

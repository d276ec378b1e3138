"""Dr. GRPO (arXiv 2503.20783): GRPO without its length bias. One constant divides every sum of tokens, and there is no KL.

Example:
    >>> DR_GRPO.aggregate, DR_GRPO.kl
    ('constant', 'none')
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

DR_GRPO = replace(GRPO, name="dr_grpo", paper="2503.20783", aggregate="constant", kl="none", kl_coefficient=0.0)

"""DPPO (arXiv 2602.04879): a trust region by the divergence from the sampler in place of a clip of the ratio.

The ratio of a rare token is large long before its probability has moved; a divergence measures how far it has moved. `dppo_tv` limits
the total variation to 0.2, `dppo_kl` the KL to 0.05. The ratio itself is not capped; verl's version caps it at 20.

Example:
    >>> DPPO_TV.surrogate, DPPO_TV.clip_high, DPPO_KL.clip_high, DPPO_TV.anchor
    ('tv', 0.2, 0.05, 'rollout')
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

DPPO_TV = replace(
    GRPO,
    name="dppo_tv",
    paper="2602.04879",
    surrogate="tv",
    anchor="rollout",
    aggregate="token_mean",
    kl="none",
    kl_coefficient=0.0,
    minibatches=4,
)
DPPO_KL = replace(DPPO_TV, name="dppo_kl", surrogate="kl", clip_low=0.05, clip_high=0.05)

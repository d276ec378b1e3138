"""CHORD (arXiv 2508.11408): GRPO with an expert stream whose weight mu decays, from imitation to exploration.

The paper decays over 200 steps; here a run of any length decays over three quarters of its updates, unless `mu_decay_steps` is given.
`phi="p_one_minus_p"` weights each expert token by p(1-p): learnt tokens and tokens far out of reach count little.

Example:
    >>> CHORD.mu_peak, CHORD.mu_valley, CHORD_PHI.phi
    (0.9, 0.05, 'p_one_minus_p')
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

CHORD = replace(
    GRPO,
    name="chord",
    paper="2508.11408",
    advantage="group_z",
    kl="none",
    kl_coefficient=0.0,
    mu_peak=0.9,
    mu_valley=0.05,
    mu_decay_steps=None,
)
CHORD_PHI = replace(CHORD, name="chord_phi", mu_peak=0.1, mu_valley=0.1, mu_decay_steps=0, phi="p_one_minus_p")

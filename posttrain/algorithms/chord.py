"""CHORD (arXiv 2508.11408): GRPO with an expert stream whose weight mu decays, from imitation to exploration.

The paper decays over 200 steps; here a run of any length decays over three quarters of its updates, unless `mu_decay_steps` is given.
`phi="p_one_minus_p"` weights each expert token by p(1-p): learnt tokens and tokens far out of reach count little.

Example:
    >>> CHORD.mu_peak, CHORD.mu_valley, CHORD_PHI.phi
    (0.9, 0.05, 'p_one_minus_p')
"""

import math
from dataclasses import replace

from posttrain.algorithms.grpo import GRPO
from posttrain.algorithms.specs import OnPolicy
from posttrain.errors import ConfigError

DECAY_SHARE = 0.75
"""Share of the run's updates over which CHORD's weight decays if no number of steps is given."""

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


def scheduled(spec: OnPolicy, updates: int) -> OnPolicy:
    """Return the spec with CHORD's schedule in optimiser steps of a run of `updates`.

    Raises:
        ConfigError: the schedule does not end within the run, which would be mostly imitation.
    """
    if not spec.has_expert:
        return spec
    decay = spec.mu_decay_steps
    if decay is None:
        decay = math.floor(DECAY_SHARE * max(0, updates - spec.mu_warmup_steps))
    if spec.mu_warmup_steps + decay > updates or spec.mu_warmup_steps >= updates:
        raise ConfigError(
            f"{spec.name}: mu_warmup_steps = {spec.mu_warmup_steps} and mu_decay_steps = {decay} are longer than the run's {updates}"
            " optimiser steps, so the weight of the demonstrations would not reach mu_valley. Lower them, or set mu_decay_steps: null"
            " for three quarters of the run"
        )
    return replace(spec, mu_decay_steps=decay)

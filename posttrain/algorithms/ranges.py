"""For every numeric option its range.

Example:
    >>> RANGES["gamma"], range_in_words(1, math.inf)
    ((0.0, 1.0), 'at least 1')
"""

from __future__ import annotations

import math
import sys

# option -> (minimum, maximum); only clip widths and counts may be infinite
RANGES: dict[str, tuple[float, float]] = {
    "clip_low": (0.0, math.inf),
    "clip_high": (0.0, math.inf),
    "value_clip": (0.0, math.inf),
    "dual_clip": (1.0, math.inf),
    "tau_positive": (sys.float_info.min, sys.float_info.max),
    "tau_negative": (sys.float_info.min, sys.float_info.max),
    "mismatch_cap": (1.0, math.inf),
    "entropy_coefficient": (0.0, sys.float_info.max),
    "kl_coefficient": (0.0, sys.float_info.max),
    "value_coefficient": (0.0, sys.float_info.max),
    "score_scale": (0.0, sys.float_info.max),
    "nll_coefficient": (0.0, sys.float_info.max),
    "pair_coefficient": (sys.float_info.min, sys.float_info.max),
    "desirable_weight": (sys.float_info.min, sys.float_info.max),
    "undesirable_weight": (sys.float_info.min, sys.float_info.max),
    "missing_eos_penalty": (0.0, sys.float_info.max),
    "target_margin": (-sys.float_info.max, sys.float_info.max),
    "beta": (sys.float_info.min, sys.float_info.max),
    "kl_target": (sys.float_info.min, sys.float_info.max),
    "gamma": (0.0, 1.0),
    "lam": (0.0, 1.0),
    "mu_peak": (0.0, 1.0),
    "mu_valley": (0.0, 1.0),
    "mu_warmup_steps": (0, math.inf),
    "mu_decay_steps": (0, math.inf),
    "overlong_share": (0.0, 1.0),
    "epochs": (1, math.inf),
    "minibatches": (1, math.inf),
    "refill_limit": (1, math.inf),
    "kl_horizon": (1, math.inf),
}


def range_in_words(least: float, greatest: float) -> str:
    """Return the range of an option in words."""
    if greatest == 1:
        return f"in [{least:g}, 1]"
    if greatest == math.inf:
        return f"at least {least:g}"
    return {0.0: "a finite number, not negative", sys.float_info.min: "a finite number above 0"}.get(
        least, "a finite number"
    )

"""The axes of the design space: the names that options of an algorithm may have.

Example:
    >>> from typing import get_args
    >>> get_args(Ratio)
    ('token', 'sequence')
"""

from __future__ import annotations

from typing import Literal

RewardCombination = Literal["sum", "group_normalised"]
Advantage = Literal["gae", "group_mean", "group_z", "leave_one_out", "group_rate", "batch_z", "teacher"]
GroupAdvantage = Literal["group_mean", "group_z", "leave_one_out", "group_rate"]
Ratio = Literal["token", "sequence"]
Surrogate = Literal["clip", "weight", "soft", "geometric", "tv", "kl"]
Anchor = Literal["old", "rollout"]
Aggregate = Literal["token_mean", "sequence_mean", "constant"]
KlPlace = Literal["none", "reward", "loss"]
KlEstimator = Literal["k1", "k2", "k3"]
Filter = Literal["none", "drop", "refill"]
Mismatch = Literal["none", "truncate", "mask", "seq_truncate", "seq_mask"]
Critic = Literal["separate", "shared"]
CriticStart = Literal["reward", "sft"]
Phi = Literal["none", "p_one_minus_p"]

"""The design space of post-training algorithms as frozen records.

An algorithm is a point in this space: data, not code. This module imports neither torch nor transformers, so that a configuration can be
checked without them.

Example:
    A variant of a preset is a replaced field:

    >>> from dataclasses import replace
    >>> from posttrain.algorithms.grpo import GRPO
    >>> replace(GRPO, aggregate="constant").aggregate
    'constant'
"""

from __future__ import annotations

from posttrain.algorithms.offline import LoggedGroups, Preference, Unpaired
from posttrain.algorithms.on_policy import OnPolicy

Algorithm = OnPolicy | Preference | LoggedGroups | Unpaired

__all__ = ["Algorithm", "LoggedGroups", "OnPolicy", "Preference", "Unpaired"]

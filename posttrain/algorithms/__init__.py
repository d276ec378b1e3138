"""The presets by name, and variants of a preset by options.

Example:
    >>> choose("grpo").advantage, choose("grpo", {"advantage": "group_z"}).advantage
    ('group_mean', 'group_z')
    >>> choose("dpo", {"beta": 0.2}).beta
    0.2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.algorithms.checks import check_spec, checked_options
from posttrain.algorithms.chord import CHORD, CHORD_PHI
from posttrain.algorithms.cispo import CISPO
from posttrain.algorithms.dapo import DAPO
from posttrain.algorithms.distill import DISTILL
from posttrain.algorithms.dpo import DPO, DPO_SOFT, HINGE, IPO, ORPO, ROBUST, SIMPO
from posttrain.algorithms.dppo import DPPO_KL, DPPO_TV
from posttrain.algorithms.dr_grpo import DR_GRPO
from posttrain.algorithms.gmpo import GMPO
from posttrain.algorithms.grpo import GRPO
from posttrain.algorithms.grpo_pairs import GRPO_PAIRS
from posttrain.algorithms.gspo import GSPO
from posttrain.algorithms.kto import KTO
from posttrain.algorithms.maxrl import MAXRL
from posttrain.algorithms.ppo import PPO
from posttrain.algorithms.reinforce_pp import REINFORCE_PP
from posttrain.algorithms.rloo import RLOO
from posttrain.algorithms.sapo import SAPO
from posttrain.algorithms.specs import Algorithm, LoggedGroups, OnPolicy, Preference, Unpaired
from posttrain.api_arguments import require
from posttrain.errors import ConfigError
from posttrain.text import nearest

PRESETS: dict[str, Algorithm] = {
    spec.name: spec
    for spec in (
        PPO,
        GRPO,
        DR_GRPO,
        GSPO,
        DAPO,
        CHORD,
        CHORD_PHI,
        RLOO,
        REINFORCE_PP,
        CISPO,
        SAPO,
        GMPO,
        DPPO_TV,
        DPPO_KL,
        MAXRL,
        DISTILL,
        GRPO_PAIRS,
        DPO,
        DPO_SOFT,
        ROBUST,
        IPO,
        HINGE,
        SIMPO,
        ORPO,
        KTO,
    )
}


def choose(preset: str, options: Mapping[str, Any] | None = None) -> Algorithm:
    """Return the preset with `options` replaced.

    Raises:
        ConfigError: an unknown name, a wrong type, or an option without effect.
    """
    require("choose", "preset", preset, str, "a preset's name, such as 'grpo'")
    require("choose", "options", options, (Mapping, type(None)), "options by name, such as {'clip_high': 0.3}")
    if preset not in PRESETS:
        raise ConfigError(f"unknown algorithm preset {preset!r}{nearest(preset, PRESETS)}")
    spec = checked_options(PRESETS[preset], options or {})
    check_spec(spec, set(options or {}))
    return spec


__all__ = ["PRESETS", "Algorithm", "LoggedGroups", "OnPolicy", "Preference", "Unpaired", "choose"]

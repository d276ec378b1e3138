"""Add the panel that trains on the reward model to params.yaml, so that a comparison shows over-optimisation next to the true answer.

Each PPO and GRPO of the comparison gets a twin, such as `ppo_rm`, that differs in its training reward only. Runs of the others stay as
they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.commands.configure import configure
from pipelines.config.params import Params, load_params
from posttrain.errors import ConfigError

PANELS = ("reward_model",)
TWINNED = ("ppo", "grpo")
"""Presets that get a twin."""


def add_panel(root: Path) -> list[str]:
    """Change `algorithms` and `project.algorithms` of params.yaml, and return the lines to print.

    Raises:
        ConfigError: the comparison has no PPO or GRPO that trains on a true reward, or no reward model.
    """
    path = root / "params.yaml"
    params = load_params(path)
    model = _reward_model(params)
    made = {f"{name}_{model}": _twin(params, name, model) for name in _twinned(params, model)}
    if not made:
        raise ConfigError(
            "panel reward_model: project.algorithms has no algorithm with the preset ppo or grpo that trains on a true reward; add one,"
            " for example: posttrain configure project.algorithms=[ppo,grpo]"
        )
    present = params.project.algorithms
    added = [name for name in made if name not in present]
    if not added:
        return [f"panel: {', '.join(made)} are in the comparison already"]
    sections = [f"algorithms.{name}={json.dumps(made[name])}" for name in added if name not in params.algorithms]
    configure(path, [*sections, f"project.algorithms={json.dumps([*present, *added])}"])
    return [
        f"panel: {', '.join(added)} are added to params.yaml, which train on the reward model {model}; runs of the others stay as they"
        " are. The report ranks one panel, and draws true reward and score against KL for both"
    ]


def _reward_model(params: Params) -> str:
    """Return the name of the reward that is the reward model."""
    found = [name for name, section in params.rewards.items() if section.function == "reward_model"]
    if not found or not params.reward.enabled:
        raise ConfigError(
            "panel reward_model: there is no reward model to train on; set reward.enabled: true and"
            " rewards: {rm: {function: reward_model}}"
        )
    return found[0]


def _twinned(params: Params, model: str) -> list[str]:
    """Return the algorithms of the comparison that get a twin."""
    return [
        name
        for name in params.project.algorithms
        if params.algorithms[name].preset in TWINNED and not (params.algorithms[name].rewards or {}).get(model)
    ]


def _twin(params: Params, name: str, model: str) -> dict[str, Any]:
    """Return the section of an algorithm with all weight on the reward model; its other rewards are measured.

    `tuned` is left out: its values were found for a different reward.
    """
    section = params.algorithms[name]
    given = section.model_dump(exclude_unset=True, exclude={"tuned"})
    return given | {"rewards": {model: 1.0} | dict.fromkeys(sorted({*(section.rewards or {})} - {model}), 0.0)}

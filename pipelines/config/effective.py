"""Name the hyper-parameters that a run used, one name each, from the flat parameters of its journal.

`align.on_policy.optimizer.learning_rate`, an override under `algorithms.grpo.budget`, and `sft.optimizer.learning_rate` are all
`optimizer.learning_rate` here. The options of a preset are resolved, and an option without effect is omitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.algorithms import Algorithm, OnPolicy, choose
from posttrain.algorithms.chord import scheduled
from posttrain.algorithms.limits import effective_options
from posttrain.errors import ConfigError

TRAINING = ("sft", "reward", "align")
SECTIONS = {"sft": "sft", "reward": "reward", "evaluate": "evaluation"}
_NOT_HYPER_PARAMETERS = ("checkpoint.", "faults.", "samples_every", "samples_shown", "on_policy.", "preference.")


def effective_parameters(stage: str, arguments: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a run by their common names.

    A stage without its own section keeps the names of params.yaml, and so does a run whose preset or option no longer exists.
    """
    if stage == "align":
        try:
            return _aligned(str(arguments["algorithm"]), values)
        except (ConfigError, KeyError):
            return dict(values)
    if stage in SECTIONS:
        return _hyper_parameters(under(values, SECTIONS[stage]))
    return dict(values)


def spec_of(algorithm: str, values: Mapping[str, Any]) -> Algorithm:
    """Return the algorithm's spec as the run was configured. Raises ConfigError if its preset no longer exists."""
    own = under(values, f"algorithms.{algorithm}")
    return choose(own["preset"], under(own, "options"))


def under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the values below a dotted prefix, by the rest of their names."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def _aligned(algorithm: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of one alignment: spec, budget, reward weights and settings of training."""
    own, spec = under(values, f"algorithms.{algorithm}"), spec_of(algorithm, values)
    kind = "on_policy" if isinstance(spec, OnPolicy) else "preference"
    budget = under(values, f"align.{kind}") | under(own, "budget")
    if isinstance(spec, OnPolicy):
        if not spec.has_critic:
            budget.pop("critic_learning_rate", None)
        if spec.needs_reference:
            budget.pop("measure_kl_every", None)
        if spec.has_expert:
            spec = scheduled(spec, budget["steps"] * spec.epochs * spec.minibatches)
    weights = {f"reward_weight.{name}": weight for name, weight in under(own, "rewards").items() if weight}
    shared = _hyper_parameters(under(values, "align"))
    return {"preset": own["preset"], **effective_options(spec), **shared, **_hyper_parameters(budget), **weights}


def _hyper_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without those that are unset or do not change the trained model."""
    return {
        name: value
        for name, value in values.items()
        if value is not None and not name.startswith(_NOT_HYPER_PARAMETERS)
    }

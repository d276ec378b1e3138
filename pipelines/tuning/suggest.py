"""Suggest the next trial of an algorithm from the scores of its earlier ones, with Optuna's TPE sampler (1907.10902)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from pipelines.config.params import Params
from pipelines.config.tune_schema import SearchRange
from pipelines.tuning.trials import Trial, space_of, trial
from posttrain.errors import ConfigError

DRAWN = 2
"""Trials after the first that are drawn at random before the sampler uses scores."""


def suggest(params: Params, earlier: Sequence[Trial], scores: Sequence[float]) -> Trial:
    """Return the next trial. It is a pure function of the parameters and the earlier trials, so a search can be continued.

    Args:
        earlier: all trials of one algorithm so far, in order; the first is the section as given, whose place in the space is unknown.
        scores: mean reward of each on the selection prompts.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "tune.method = 'tpe' needs Optuna, which is not installed. Type: pip install 'posttrain[tune]'; or set tune.method: random"
        ) from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = earlier[0].algorithm
    space = {path: _distribution(optuna, found) for path, found in sorted(space_of(params, name).items())}
    digest = hashlib.sha256(f"{params.tune.seed}/{name}/{len(earlier)}".encode()).digest()
    sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4]), n_startup_trials=DRAWN)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for one, score in zip(earlier[1:], scores[1:], strict=True):
        study.add_trial(optuna.trial.create_trial(params=dict(one.values), distributions=space, value=score))
    asked = study.ask(space).params
    return trial(params, name, len(earlier), {path: _rounded(value) for path, value in sorted(asked.items())})


def _distribution(optuna: Any, found: SearchRange) -> Any:
    if found.values is not None:
        return optuna.distributions.CategoricalDistribution(found.values)
    return optuna.distributions.FloatDistribution(found.low, found.high, log=found.log)


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value

"""Which inputs decided a model's weights. DVC records all inputs that dvc.yaml declares: every align stage declares all tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.lineage.records import Artifact, StageRecord
from posttrain.algorithms import LoggedGroups, OnPolicy, Preference, choose
from posttrain.errors import ConfigError

SFT, PREFERENCES, PROBLEMS, LABELLED = (
    f"data/valid/{table}.parquet" for table in ("sft", "preferences", "problems", "labelled")
)
HELDOUT = "data/valid/preferences_heldout.parquet"
REWARD = "models/reward"
REWARD_RECORDS = "runs/reward_readers/artifacts/algorithms"
"""Folder of the records on which align stages depend in place of the reward model."""


def trained_on(record: StageRecord) -> tuple[Artifact, ...]:
    """Return the inputs that can have changed the outputs of a stage run.

    For an align stage these are its start, and the tables and models of its algorithm: pairs for preference algorithms, problems for
    on-policy ones, demonstrations for those with an expert stream. The reward model counts if a reward with a weight, the critic or
    the stop at divergence uses it. Held-out pairs only measure a reward model. An unknown algorithm counts with all inputs.
    """
    if record.stage.startswith("reward"):
        return tuple(each for each in record.inputs if each.path != HELDOUT)
    if not record.stage.startswith("align "):
        return record.inputs
    try:
        used = _paths(record.stage.split()[2], record.params)
    except (ConfigError, KeyError, TypeError, IndexError):
        return record.inputs
    return tuple(each for each in record.inputs if each.path in used)


def _paths(name: str, params: Mapping[str, Any]) -> set[str]:
    """Return the paths that an algorithm reads. Raises KeyError or ConfigError if the parameters do not say so."""
    section, align = params[f"algorithms.{name}"], params["align"]
    spec = choose(section["preset"], section.get("options"))
    used = {f"models/{section.get('start') or align['start']}", str(section.get("teacher"))}
    if isinstance(spec, Preference | LoggedGroups):
        return used | {PREFERENCES}
    if not isinstance(spec, OnPolicy):
        return used | {PREFERENCES, LABELLED}
    used.add(PROBLEMS)
    if spec.has_expert:
        used.add(SFT)
    weights, functions = section.get("rewards") or {}, params["rewards"]
    rewarded = any(weight and functions[reward]["function"] == "reward_model" for reward, weight in weights.items())
    budget = {**align["on_policy"], **(section.get("budget") or {})}
    starts_critic = spec.has_critic and spec.critic_start == "reward"
    if rewarded or starts_critic or budget.get("on_divergence") == "stop":
        used |= {REWARD, f"{REWARD_RECORDS}/{name}.json"}
    return used

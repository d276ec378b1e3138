"""Identify the measure of a decision: the evaluation set, and the parameters of evaluation, rewards and gate."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pipelines.config.params import load_params
from pipelines.tracking.lockfile import read_lock

TABLE = "data/valid/evaluation.parquet"


def measure(root: Path) -> str:
    """Return a short digest of the measure. A decision by a different one is out of date."""
    entries = (entry for stage in read_lock(root).values() for entry in stage.get("deps", ()))
    params = load_params(root / "params.yaml")
    about = {
        "table": next((str(entry.get("md5")) for entry in entries if entry["path"] == TABLE), None),
        "evaluation": params.evaluation.model_dump(mode="json"),
        "rewards": {name: reward.model_dump(mode="json") for name, reward in params.rewards.items()},
        "gate": params.gate.model_dump(mode="json"),
        "headline": params.report.headline,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

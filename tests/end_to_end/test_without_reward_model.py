"""A project without a reward model: the whole DAG runs, and the reward model's parameters make no other stage stale."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import TINY, Clone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
OFF = """
project: {algorithms: [dpo, grpo]}
reward: {enabled: false}
algorithms: {grpo: {rewards: {answer: 1.0, rm: null}}}
evaluation: {rewards: [answer]}
"""


def test_without_a_reward_model_everything_else_runs_and_does_not_depend_on_it(
    new_clone: Callable[[], Clone], tmp_path: Path
) -> None:
    clone = new_clone()
    (tmp_path / "off.yaml").write_text(OFF, encoding="utf-8")
    clone.configure(str(TINY), str(tmp_path / "off.yaml"))
    environment = {"POSTTRAIN_FOLLOWER": "1"}
    assert "no reward model is trained, because reward.enabled is false" in clone.repro(**environment)
    assert [path.name for path in (clone.root / "models" / "reward").iterdir()] == ["README.md"]
    for model in ("base", "sft", "dpo-0", "grpo-0"):
        metrics = json.loads((clone.root / "runs" / "evaluate" / model / "metrics.json").read_text())
        assert "reward/rm/mean" not in metrics
        assert metrics["greedy_accuracy_low"] <= metrics["greedy_accuracy"] <= metrics["greedy_accuracy_high"]
    comparison = json.loads((clone.root / "report" / "comparison.json").read_text())
    assert {"dpo", "grpo"} <= set(json.dumps(comparison).replace('"', " ").split())
    clone.configure("reward.epochs=7")
    again = clone.repro(**environment)
    ran = {line.split("'")[1] for line in again.splitlines() if line.startswith("Running stage '")}
    assert ran == {"reward", "compare"}
    assert "up to date" in clone.repro()

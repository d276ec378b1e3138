"""A run that exploits its reward model is stopped at the step at which its curves show it, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.config.params import parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.training.monitor import DivergenceMonitor
from posttrain.errors import ConfigError, NumericalError

TRUTH = [0.55, 0.5, 0.45, 0.5] * 3 + [0.1, 0.15, 0.05] * 4
"""True rewards that diverge at step 14, counted from 1, if the score rises."""


def answers(truth: float, score: float) -> list[Any]:
    """Return four answers with these means; one has no reward."""
    sources = [{"answer": truth + d, "rm": score - d} for d in (-0.05, 0.0, 0.05)]
    return [SimpleNamespace(sources=found) for found in (*sources, {"answer": None, "rm": None})]


def stopped_at(monitor: DivergenceMonitor, steps: range, score: float) -> int | None:
    for step in steps:
        try:
            monitor.check(step, answers(TRUTH[step - 1], score * step))
        except NumericalError:
            return step
    return None


def test_the_run_stops_at_the_step_that_shows_it(tmp_path: Path) -> None:
    assert stopped_at(DivergenceMonitor(tmp_path / "none", "answer", "rm"), range(1, 25), 0.1) == 14
    assert stopped_at(DivergenceMonitor(tmp_path / "none", "answer", "rm"), range(1, 25), -0.1) is None
    watched = DivergenceMonitor(tmp_path / "none", "answer", "rm")
    assert stopped_at(watched, range(1, 14), 0.1) is None
    with pytest.raises(NumericalError, match=r"since step 13 the true reward answer fell from 0.510 to 0.125"):
        watched.check(14, answers(TRUTH[13], 1.4))


def test_a_resumed_run_stops_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    lines = [
        {
            "kind": "metrics",
            "step": step,
            "values": {"reward/answer/mean": TRUTH[step - 1], "reward/rm/mean": 0.1 * step},
        }
        for step in range(1, 14)
    ]
    journal.write_text("".join(json.dumps(line) + "\n" for line in [{"kind": "start"}, *lines]), encoding="utf-8")
    # resumed after step 11: the journal's later steps are computed again
    assert stopped_at(DivergenceMonitor(journal, "answer", "rm"), range(12, 25), 0.1) == 14
    assert stopped_at(DivergenceMonitor(tmp_path / "none", "answer", "rm"), range(12, 25), 0.1) is None


def test_stopping_needs_a_reward_model_and_a_true_reward(root: Path) -> None:
    tree = read_yaml(root / "params.yaml")
    tree["algorithms"]["grpo"] = {"preset": "grpo", "rewards": {"answer": 1.0}, "budget": {"on_divergence": "stop"}}
    with pytest.raises(ConfigError, match=r"algorithms.grpo.budget.on_divergence: has no effect here"):
        parse_params(tree)
    tree["algorithms"]["grpo"]["rewards"] = {"rm": 1.0, "answer": 0.0}
    assert parse_params(tree).watched_rewards("grpo") == ("answer", "rm")

"""The tool that kills training at random: reproducible draws, an honest table, and twenty kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.kill_series import USUAL, Trial, draw, run, table
from tests.reliability.kill_ways import KINDS, Starter


def test_a_trial_depends_only_on_seed_and_number() -> None:
    first, second = (draw(3, 5, ["warm", "dvc"]) for _ in range(2))
    assert first[1:] == second[1:]
    assert first[0].random() == second[0].random()
    assert [draw(0, index, ["step"])[1] for index in range(len(USUAL))] == USUAL


def test_the_table_counts_kills_by_kind_and_way_and_runs_that_differ() -> None:
    trials = [
        Trial(0, "sft", "warm", ["python", "python"]),
        Trial(1, "reward", "dvc", ["dvc"], ["models/reward/model.safetensors"]),
        Trial(2, "dpo", "warm"),
    ]
    text = table(trials, 7, "warm,dvc")
    assert "3 kills in 2 runs; 1 of 2 runs are identical" in text
    assert "| sft | 2 | 0 | 0 | 0 | 0 | 2 | 1 | 1 |" in text
    assert "| reward | 0 | 0 | 1 | 0 | 0 | 1 | 1 | 0 |" in text
    ahead = table([Trial(0, "grpo_ahead", "step", ["python"])], 7, "step", ["grpo_ahead"])
    assert ahead.startswith("<!-- kill series with staleness -->")
    assert "--ways step --kinds grpo_ahead --table`: 1 kills in 1 runs; 1 of 1 runs are identical" in ahead


def test_a_forgotten_stage_leaves_the_other_entries_of_dvc_lock_as_they_are(tmp_path: Path) -> None:
    other = "  align@dpo-0:\n    cmd: b\n    outs:\n    - path: m\n      md5: 00\n"
    (tmp_path / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n  sft:\n    cmd: a\n    deps:\n    - path: x\n{other}")
    Starter(tmp_path, tmp_path)._forget(KINDS["sft"])
    assert (tmp_path / "dvc.lock").read_text() == f"schema: '2.0'\nstages:\n{other}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    trials = run(tmp_path, 1, 20, ["warm", "dvc"])
    assert sum(len(trial.victims) for trial in trials) == 20
    assert [trial for trial in trials if trial.differences] == []

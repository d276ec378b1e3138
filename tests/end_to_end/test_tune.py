"""Tuning runs trials, choice and new seeds as stages, and a second call runs none."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from pipelines.config.params import load_params
from pipelines.config.yaml_files import read_yaml
from tests.end_to_end.conftest import TINY, Clone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_tuning_trains_equal_trials_and_writes_sections_that_params_accept(new_clone: Callable[[], Clone]) -> None:
    clone = new_clone()
    clone.configure(str(TINY), "project.algorithms=[dpo]", "project.seeds=[0, 1]", "tune.trials=2")
    first = clone.run("flows.tune", "--no-tracking")
    text = (clone.root / ".posttrain" / "tune" / "tuning.md").read_text(encoding="utf-8")
    assert text.startswith("# Tuning\n\n2 trials of each algorithm (random, seed 0), trained with seed 1000.")
    assert text in first.stdout
    assert re.search(r"align@dpo_t1-1000 +done in", first.stdout)
    section = read_yaml(clone.root / ".posttrain" / "tune" / "tuned.yaml")["algorithms"]["dpo"]
    assert section["tuned"].startswith("best of 2 trials (random)")
    again = clone.run("flows.tune", "--no-tracking")
    assert " done in " not in again.stdout
    assert text in again.stdout
    clone.configure(".posttrain/tune/tuned.yaml")
    assert load_params(clone.root / "params.yaml").algorithms["dpo"].tuned == section["tuned"]

"""The A/A table and the plan's power, from a tree of finished runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.commands.calibrate import page, power, tables
from pipelines.config.params import Params, load_params
from posttrain.errors import DataError
from posttrain.evaluation.crossed import Spread
from tests.pipelines.synthetic_runs import build


def params_with(root: Path, seeds: list[int]) -> Params:
    params = load_params(root / "params.yaml")
    return params.model_copy(
        update={"project": params.project.model_copy(update={"algorithms": ["dpo", "grpo"], "seeds": seeds})}
    )


def test_the_table_holds_both_methods_and_the_power(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = [0, 1, 2, 3]
    build(tmp_path, algorithms=("dpo", "grpo"), seeds=tuple(seeds), steps=2)
    monkeypatch.chdir(tmp_path)
    params = params_with(root, seeds)
    scores = tables(params)
    assert {name: table.shape for name, table in scores.items()} == {"dpo": (120, 4), "grpo": (120, 4)}
    text = page(params, scores, [1, 2, 3])
    assert "| prompts only | 1 |" in text
    assert "| 12 | " in text  # six single pairs of four seeds, for each of two algorithms
    assert "| seeds and prompts | 2 |" in text
    assert "| seeds and prompts | 3 |" not in text
    widest = max(Spread.of(table, table).run for table in scores.values())
    between = Spread.of(scores["dpo"], scores["grpo"]).prompt
    rest = next(Spread.of(t, t).rest for t in scores.values() if Spread.of(t, t).run == widest)
    smallest = Spread(widest, between, rest).smallest_difference(4, 120)
    assert power(params).startswith(
        f"4 seeds an algorithm and 120 prompts show a difference of {100 * smallest:.1f} points"
    )


def test_without_two_seeds_the_plan_says_how_to_find_out(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "A pilot is `make demo SEEDS=2`" in power(params_with(root, [0]))
    with pytest.raises(DataError, match=r"project\.seeds has 1 seed; copies of an algorithm are runs with other seeds"):
        tables(params_with(root, [0]))
    with pytest.raises(DataError, match="the report needs runs that do not exist"):
        tables(params_with(root, [0, 1]))
    assert np.isfinite(replace(Spread(0.1, 0.1, 0.1), run=0.0).smallest_difference(2, 10))

"""The report names the rule and the step by which the evaluated weights were chosen."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from pipelines.compare import question_of
from pipelines.config.params import load_params
from pipelines.report.analysis import compare
from pipelines.report.checkpoints import Rule, chosen_steps, rule
from pipelines.report.load import load
from pipelines.report.page import Picture, page
from pipelines.report.tables import checkpoints_csv
from tests.pipelines.read_html import Text
from tests.pipelines.synthetic_runs import build

LAST = "The last one of every run. This rule does not depend on any score."


def shown(folder: Path, root: Path, looks: int | str = 1) -> str:
    """Return the text of the page, without its pictures."""
    params = load_params(root / "params.yaml")
    params = params.model_copy(update={"report": params.report.model_copy(update={"looks": looks})})
    question, results = question_of(params), load(["dpo", "grpo"], [0], folder)
    drawn = defaultdict(lambda: Picture("none", "", "", {"light": b"", "dark": b""}, (1, 1)))
    return Text(page(results, compare(results, question), drawn, 1, 0)).text


def test_the_chosen_steps_are_on_the_page_and_in_a_table(tmp_path: Path, root: Path) -> None:
    folder = build(tmp_path, ("dpo", "grpo"), prompts=16, attack=False, selected=30)
    results = load(["dpo", "grpo"], [0], folder)
    assert rule(results) == Rule(10, 100, "answer")
    rows = chosen_steps(results, "answer")
    assert [(row.algorithm, row.seed, row.step, row.steps, row.measured, row.selection) for row in rows] == [
        ("dpo", 0, 30, 40, 4, 0.875),
        ("grpo", 0, 30, 40, 4, 0.875),
    ]
    greedy = results.of("grpo")[0].predictions.numbers["reward_answer"][:, 0]
    assert rows[1].evaluation == pytest.approx(np.mean(greedy))
    table = list(csv.reader(checkpoints_csv(rows).splitlines()))
    assert table[0] == ["model", "seed", "step", "steps", "measured", "selection", "evaluation"]
    assert table[1][:6] == ["dpo", "0", "30", "40", "4", "0.875"]
    text = shown(folder, root)
    assert (
        "The best of every 10 steps and the last one, by the greedy answers' mean reward answer on 100 problems" in text
    )
    assert "30 / 40" in text
    assert LAST not in text


def test_without_the_rule_the_page_names_the_last_step(tmp_path: Path, root: Path) -> None:
    folder = build(tmp_path, ("dpo", "grpo"), prompts=16, attack=False)
    results = load(["dpo", "grpo"], [0], folder)
    assert (rule(results), chosen_steps(results, "answer")) == (None, [])
    text = shown(folder, root)
    assert LAST in text
    assert "/ 40" not in text
    assert "Repeated looks" not in text
    assert "Always valid: n seeds have 1 / (n (n − 1)) of the error" in shown(folder, root, "always")
    assert "3 looks share the level equally" in shown(folder, root, 3)

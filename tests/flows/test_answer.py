"""The answer that a flow prints on the terminal, read as a user reads it: in columns of a narrow window."""

import json
from pathlib import Path

import pytest

from flows.answer import WIDTH, answer
from pipelines.report.analysis import Question, compare
from pipelines.report.load import load
from pipelines.report.tables import comparison_json
from posttrain.evaluation.statistics import Resampling
from tests.pipelines.synthetic_runs import RATES, build

QUESTION = Question("answer", ("answer", "rm"), ("rm",), (1, 4), Resampling(400, 0.95, 0), headline="greedy")


def compared(folder: Path, seeds: tuple[int, ...]) -> list[str]:
    build(folder, seeds=seeds, steps=4)
    tree = comparison_json(compare(load(("dpo", "grpo", "ppo"), seeds, folder), QUESTION))
    (folder / "report").mkdir()
    (folder / "report/comparison.json").write_text(tree)
    runs = [{"name": f"align-grpo-{seed}", "seconds": 40.0 + seed} for seed in seeds] + [
        {"name": "sft", "seconds": 9.6}
    ]
    (folder / ".posttrain/costs").mkdir(parents=True)
    (folder / ".posttrain/costs/costs.json").write_text(json.dumps({"runs": runs}))
    return answer(folder)


def test_the_terminal_shows_a_table_with_what_is_ranked_and_why_the_rest_is_not(tmp_path: Path) -> None:
    lines = compared(tmp_path, (0,))
    assert max(map(len, lines)) <= WIDTH
    assert " ".join(lines[:2]).startswith("answer: In this run with one seed, grpo wins; dpo had a different protocol")
    rows = {words[0]: words for line in lines if (words := line.split()) and words[0] in ("model", *RATES)}
    assert list(rows) == ["model", "grpo", "ppo", "dpo", "sft", "base"]
    # 91 of 120 greedy answers are right; the interval is Wilson's
    assert rows["grpo"] == ["grpo", "75.8", "%", "67.4", "to", "82.6", "40"]
    assert rows["sft"][-1] == "10"
    assert " ".join(rows["dpo"]).endswith("- not ranked: trained on logged pairs")
    assert "not ranked" not in " ".join(rows["ppo"])
    assert "a second run may give a different order" in " ".join(lines)


def test_with_two_seeds_the_answer_is_about_training_and_times_are_means(tmp_path: Path) -> None:
    lines = compared(tmp_path, (0, 3))
    assert not any("this run" in line for line in lines)
    assert "2 training seeds per algorithm" in " ".join(lines)
    assert next(line for line in lines if line.startswith("  grpo")).split()[-1] == "42"


def test_long_reasons_are_wrapped_and_without_a_report_nothing_is_said(tmp_path: Path) -> None:
    assert answer(tmp_path) == []
    level = {"mean": 0.5, "low": 0.4, "high": 0.6}
    tree = {
        "title": "long " * 40, "findings": ["scope", "Accuracy is near zero"], "solved": False, "headline": "sampled_accuracy",
        "confidence": 0.95, "ranked": ["grpo"], "not_ranked": {"dpo": ["trained on reward " + "and reward ".join("abcdefghi")]},
        "models": {"grpo": {"sampled_accuracy": level}, "dpo": {"sampled_accuracy": level}},
    }  # fmt: skip
    (tmp_path / "report").mkdir()
    (tmp_path / "report/comparison.json").write_text(json.dumps(tree))
    lines = answer(tmp_path)
    assert max(map(len, lines)) <= WIDTH
    assert lines[-1] == "scope Accuracy is near zero"
    assert " ".join(" ".join(lines).split()).count("and reward") == pytest.approx(8)

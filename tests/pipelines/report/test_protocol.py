"""Algorithms are ranked together only with equal protocols."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipelines.compare import question_of
from pipelines.config.params import load_params
from pipelines.report.load import Model, Predictions, Results, Training
from pipelines.report.measured import all_runs, training_seconds
from pipelines.report.protocol import Protocol, _signal, main_panel, panels, protocols
from pipelines.report.setup import setup_of
from pipelines.report.templating import bound

ANSWER, MODEL = "reward answer", "reward rm"
FOUND = {
    "dpo": Protocol("logged pairs", "models/sft", "a", "as given", None),
    "ppo": Protocol(MODEL, "models/sft", "a", "as given", 1000.0),
    "grpo": Protocol(ANSWER, "models/sft", "a", "as given", 1000.0),
    "gspo": Protocol(ANSWER, "models/sft", "a", "as given", 1090.0),
    "dapo": Protocol(ANSWER, "models/sft", "a", "as given", 3600.0),
    "bare": Protocol(ANSWER, "models/base", "c", "as given", 1000.0),
    "lucky": Protocol(ANSWER, "models/sft", "a", "best of 9", 1000.0),
    "late": Protocol(ANSWER, "models/sft", "b", "as given", 1000.0),
    "other": Protocol(ANSWER, "models/sft", "a", "as given", 1000.0, "f"),
}


def test_panels_hold_equal_start_signal_and_budget() -> None:
    assert panels(FOUND) == [*(["dpo"], ["ppo"], ["grpo", "gspo"], ["dapo"], ["bare"], ["lucky"], ["late"], ["other"])]


def test_what_differs_is_named() -> None:
    norm = FOUND["grpo"]
    assert FOUND["gspo"].differs(norm, "tokens_sampled") == []
    assert FOUND["dapo"].differs(norm, "tokens_sampled") == ["3.6 times the tokens sampled"]
    assert FOUND["dapo"].differs(norm, "optimiser_steps") == ["3.6 times the optimiser steps"]
    assert FOUND["dpo"].differs(norm, "tokens_sampled") == ["trained on logged pairs"]
    assert FOUND["bare"].differs(norm, "tokens_sampled") == ["started from models/base"]
    assert FOUND["lucky"].differs(norm, "tokens_sampled") == ["tuned: best of 9"]
    assert FOUND["late"].differs(norm, "tokens_sampled") == ["a different starting model"]
    assert FOUND["other"].differs(norm, "tokens_sampled") == ["different training prompts"]
    assert Protocol(ANSWER, "models/sft", "a", "as given", None).differs(norm, "tokens_sampled") == [
        "no tokens sampled"
    ]


def test_the_headline_ranks_the_largest_panel_and_of_equal_ones_the_best() -> None:
    level = dict.fromkeys(FOUND, 0.5)
    assert main_panel(FOUND, level | {"dpo": 0.9}) == ["grpo", "gspo"]
    two = {name: FOUND[name] for name in ("dpo", "grpo")}
    assert main_panel(two, level | {"grpo": 0.6}) == ["grpo"]
    assert main_panel({}, {}) == []


def timed(project: Path, name: str, seconds: float) -> None:
    folder = project / ".posttrain" / "runs" / f"align-{name}-{'a' * 16}"
    folder.mkdir(parents=True)
    lines = [{"kind": "start", "time": 50.0}, {"kind": "end", "time": 50.0 + seconds}]
    (folder / "measurements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_with_wall_time_as_the_budget_only_algorithms_of_equal_seconds_on_this_machine_are_ranked(
    tmp_path: Path,
) -> None:
    algorithms, seeds = ("grpo", "ppo", "gspo"), (0, 1)
    for name, seconds in {"grpo-0": 10, "grpo-1": 14, "ppo-0": 12, "ppo-1": 12.6, "gspo-0": 12}.items():
        timed(tmp_path, name, seconds)
    # gspo-1 was restored, so that its time here is unknown
    seconds = training_seconds(all_runs(tmp_path), algorithms, seeds)
    assert seconds == {"grpo": 12.0, "ppo": pytest.approx(12.3)}
    found = {name: Protocol(ANSWER, "models/sft", "a", "as given", seconds.get(name)) for name in algorithms}
    assert panels(found) == [["grpo", "ppo"], ["gspo"]]
    assert found["gspo"].differs(found["grpo"], "wall_time") == ["not timed on this machine"]
    twice = Protocol(ANSWER, "models/sft", "a", "as given", 24.0)
    assert twice.differs(found["grpo"], "wall_time") == ["2 times the wall time"]


def test_the_cells_of_a_protocol_come_from_the_runs(tmp_path: Path) -> None:
    params = {
        "algorithms.grpo.preset": "grpo",
        "algorithms.grpo.rewards.answer": 1.0,
        "algorithms.grpo.tuned": "best of 4",
    }
    inputs = {"models/sft": "s", "data/valid/problems.parquet": "p", "data/valid/preferences.parquet": "q"}
    runs = {
        "grpo": Training("grpo-0", {}, {}, params, inputs),
        "dpo": Training("dpo-0", {}, {}, {"algorithms.dpo.preset": "dpo"}, inputs),
    }
    empty = Predictions((), [], [], [], {})
    models = [Model(f"{name}-0", name, 0, empty, {}, run) for name, run in runs.items()]
    results = Results(models, runs["grpo"], runs["grpo"], list(runs), [0])
    found = protocols(results, {"grpo": 5.0})
    assert found["grpo"] == Protocol(ANSWER, "models/sft", "s", "best of 4", 5.0, "p")
    assert found["dpo"] == Protocol("logged pairs", "models/sft", "s", "as given", None, "q")


def test_the_setup_lists_tables_and_models_of_training_and_evaluation_and_no_other_file() -> None:
    inputs = {"models/sft": "s", "data/valid/problems.parquet": "p", "runs/reward_readers/artifacts/a.json": "x"}
    run = Training("grpo-0", {}, {}, {"algorithms.grpo.preset": "grpo"}, inputs)
    empty = Predictions((), [], [], [], {})
    asked = {"models/base": "b", "data/valid/evaluation.parquet": "e"}
    models = [Model("base", "base", None, empty, {}, None, evaluated=asked), Model("grpo-0", "grpo", 0, empty, {}, run)]
    found = setup_of(Results(models, run, run, ["grpo"], [0])).inputs
    assert list(found.items()) == [
        ("data/valid/evaluation.parquet", "e"), ("data/valid/problems.parquet", "p"), ("models/sft", "s"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("the difference -1.3 to +1.8 %", "the difference −1.3 to +1.8\u00a0%"),
        ("区间 -1.3 至 -0.2", "区间 −1.3 至 −0.2"),
        ("rm_a-1 over-optimised 2-3", "rm_a-1 over-optimised 2-3"),
        ("（-0.5）", "（−0.5）"),
    ],
)
def test_negative_numbers_of_the_page_have_a_true_minus_sign(given: str, shown: str) -> None:
    assert bound(given) == shown


def test_several_looks_share_the_level(root: Path) -> None:
    params = load_params(root / "params.yaml")
    assert question_of(params).resampling.confidence == 0.95
    report = params.report.model_copy(update={"looks": 5})
    question = question_of(params.model_copy(update={"report": report}))
    assert (question.resampling.confidence, question.alpha) == pytest.approx((0.99, 0.01))
    # 4,000 experiments without a difference, each read after 2, 4, 6, 8 and 10 runs a side
    runs = np.random.Generator(np.random.PCG64(1)).normal(size=(4000, 2, 10))
    found = {0.05: np.zeros(4000, bool), 0.01: np.zeros(4000, bool)}
    for seeds in (2, 4, 6, 8, 10):
        p = stats.ttest_ind(runs[:, 0, :seeds], runs[:, 1, :seeds], axis=1).pvalue
        for alpha, hits in found.items():
            hits |= p < alpha
    assert found[0.05].mean() > 0.1
    assert found[0.01].mean() <= 0.05


def test_always_valid_intervals_keep_the_level_if_every_number_of_seeds_is_read(root: Path) -> None:
    params = load_params(root / "params.yaml")
    report = params.report.model_copy(update={"looks": "always"})
    # 5 seeds have a twentieth of 5 %; the parts of 2 to n seeds add up to 1 - 1 / n
    assert 1 - report.level(5) == pytest.approx(0.0025)
    assert sum(1 - report.level(n) for n in range(2, 101)) == pytest.approx(0.05 * 0.99)
    assert report.level(1) == 0.95
    project = params.project.model_copy(update={"seeds": [0, 1, 2, 3, 4]})
    question = question_of(params.model_copy(update={"report": report, "project": project}))
    assert (question.alpha, question.looks) == (pytest.approx(0.0025), "always")
    # 4,000 experiments without a difference, read after every seed from 2 to 20
    runs = np.random.Generator(np.random.PCG64(2)).normal(size=(4000, 2, 20))
    once, always = np.zeros(4000, bool), np.zeros(4000, bool)
    for seeds in range(2, 21):
        p = stats.ttest_ind(runs[:, 0, :seeds], runs[:, 1, :seeds], axis=1).pvalue
        once |= p < 0.05
        always |= p < 1 - report.level(seeds)
    assert once.mean() > 0.2
    assert always.mean() <= 0.05
    # ten runs a side that differ by 2.5 standard deviations are told apart all the same
    shifted = stats.ttest_ind(runs[:, 0, :10] + 2.5, runs[:, 1, :10], axis=1).pvalue
    assert (shifted < 1 - report.level(10)).mean() > 0.8


def test_distillation_is_trained_on_its_teacher() -> None:
    params = {"algorithms.d.preset": "distill", "algorithms.d.teacher": "self", "algorithms.d.rewards.answer": 0.0}
    assert _signal("d", Training("d", {}, {}, params, {})) == "teacher self"

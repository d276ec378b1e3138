"""The findings of a comparison, in numbers and sentences, over runs whose true accuracies are known."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.report.analysis import Comparison, Question, compare, greedy, wins
from pipelines.report.currencies import curve
from pipelines.report.curves import running_mean, seed_band, seed_mean
from pipelines.report.forest import profiles
from pipelines.report.load import load, predictions
from pipelines.report.page import Picture
from pipelines.report.page import page as html
from pipelines.report.samples import examples
from pipelines.report.style import Look
from pipelines.report.tables import comparison_json
from pipelines.report.words import entropy_kept, findings, other_measure, p_value, solved, title
from pipelines.report.write import write
from pipelines.runtime.ranking import places
from posttrain.errors import DataError
from posttrain.evaluation.crossed import crossed_difference, crossed_mean
from posttrain.evaluation.statistics import Interval, Resampling
from tests.pipelines.read_html import Text
from tests.pipelines.synthetic_runs import RATES, build

QUESTION = Question("answer", ("answer", "rm"), ("rm",), (1, 4), Resampling(400, 0.95, 0), headline="greedy")


def test_a_curve_against_a_budget_has_what_the_run_had_spent(tmp_path: Path) -> None:
    results = load(
        ("grpo", "ppo", "dpo"), (0, 3), build(tmp_path, algorithms=("grpo", "ppo", "dpo"), seeds=(0, 3), steps=4)
    )
    tokens = curve(results, "grpo", "reward/answer/mean", "tokens_sampled")
    updates = curve(results, "ppo", "reward/answer/mean", "optimiser_steps")
    assert tokens is not None
    assert updates is not None
    assert tokens[0].tolist() == [5120.0 * step for step in (1, 2, 3, 4)]
    # two epochs of one minibatch: two updates a step
    assert updates[0].tolist() == [2, 4, 6, 8]
    by_hand = np.mean([model.training.curves["reward/answer/mean"][1] for model in results.of("ppo")], axis=0)
    assert updates[1] == pytest.approx([by_hand[: i + 1].mean() for i in range(4)])
    assert curve(results, "dpo", "reward/answer/mean", "tokens_trained") is None


def test_win_rates_count_pairs_of_answers_to_one_prompt_with_ties_as_half() -> None:
    nan = float("nan")
    values, others = np.array([[1.0, 0.0], [1.0, nan], [nan, nan]]), np.array([[0.0, 0.0], [1.0, nan], [1.0, 0.0]])
    # 1 beats two zeros and 0 ties with both; one tie alone; nothing known
    assert wins(values, others)[:2].tolist() == [0.75, 0.5]
    assert np.isnan(wins(values, others)[2])


def compared(tmp_path: Path, **changes: Any) -> Comparison:
    algorithms, seeds = changes.get("algorithms", ("dpo", "grpo", "ppo")), changes.get("seeds", (0,))
    build(tmp_path, **({"steps": 4} | changes))
    return compare(load(algorithms, seeds, tmp_path), QUESTION)


def test_seeds_are_averaged_within_prompts(tmp_path: Path) -> None:
    comparison = compared(tmp_path, algorithms=("dpo", "grpo"), seeds=(0, 3))
    results = load(("dpo", "grpo"), (0, 3), tmp_path)
    both = greedy(results.of("grpo"), "answer")
    row = comparison.of("grpo")
    assert (row.seeds, both.shape) == ((0, 3), (120, 2))
    assert row.greedy.value == pytest.approx(both.mean())
    assert row.by_seed == pytest.approx(tuple(both.mean(axis=0)))
    level = crossed_mean(both)
    assert (row.greedy.low, row.greedy.high) == (level.low, level.high)
    test, by_hand = comparison.pair("dpo", "grpo").test, crossed_difference(greedy(results.of("dpo"), "answer"), both)
    assert (test.p, test.difference.low, test.difference.high) == (by_hand.p, by_hand.low, by_hand.high)
    assert test.method == f"t over seeds and prompts, {by_hand.df:.1f} degrees of freedom"
    assert comparison.costs[-1].runs == 2
    assert findings(comparison)[0].startswith(
        "2 training seeds per algorithm: intervals and tests cover other seeds and other prompts"
    )
    assert "in this run" not in title(comparison).lower()
    # two runs are too few to trim, so that the interquartile mean is the mean
    assert row.iqm == pytest.approx(both.mean())
    assert comparison.of("sft").iqm is None
    pair, left, right = comparison.pair("dpo", "grpo"), comparison.of("dpo").by_seed, both.mean(axis=0)
    spread = np.sqrt((np.var(left, ddof=1) + np.var(right, ddof=1)) / 2)
    assert pair.effect == pytest.approx((np.mean(left) - np.mean(right)) / spread * (1 - 3 / 7))
    assert pair.improvement == np.mean([x > y for x in left for y in right]) == 0
    # the supervised model is one model, so there is no standard deviation between its runs
    against = comparison.pair("grpo", "sft")
    assert (against.effect, against.improvement) == (None, 1)
    look = Look("light", ("dpo", "grpo"))
    line = profiles(comparison, look).axes[0].get_lines()[1]
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert y.tolist() == [np.mean([value > level for value in row.by_seed]) for level in x]
    assert set(y) == {0.0, 0.5, 1.0}
    assert line.get_color() == look.colour("grpo")
    text = rendered(tmp_path, comparison, ("dpo", "grpo"), (0, 3), "profiles")
    assert "Performance profiles: the share of runs above each level" in text
    assert "a t interval whose variance has a part from runs" in text
    assert "The last one of every run" in text
    assert f"<td>{100 * both.mean():.1f} %</td>" in text
    tuned = comparison.protocols | {"dpo": replace(comparison.protocols["dpo"], tuned="best of 4 trials")}
    page = rendered(tmp_path, replace(comparison, protocols=tuned), ("dpo", "grpo"), (0, 3))
    assert '<mark><span lang="en">best of 4 trials</span>' in page


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.28, 0.32, "dapo ends with more entropy than grpo: 0.300 against 0.200 nats"),
        (0.20, 0.40, "dapo's entropy at the end is not clearly above grpo's: 0.300 against 0.200"),
        (0.05, 0.15, "dapo does not end with more entropy than grpo, but with less: 0.100 against 0.200"),
    ],
)
def test_the_report_says_whether_dapo_kept_more_entropy(tmp_path: Path, low: float, high: float, said: str) -> None:
    comparison = compared(tmp_path, algorithms=("dpo", "grpo"))
    assert entropy_kept(comparison) is None
    interval = Interval((low + high) / 2, low, high, 120, 0, "by hand")
    dapo = replace(comparison.of("grpo"), name="dapo", entropy=interval)
    grpo = replace(comparison.of("grpo"), entropy=replace(interval, value=0.2, low=0.18, high=0.22))
    assert entropy_kept(replace(comparison, summaries=[grpo, dapo])).startswith(said)


def test_failure_at_the_task_is_called_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RATES:
        monkeypatch.setitem(RATES, name, -1.0)
    comparison = compared(tmp_path, algorithms=("dpo", "grpo"))
    assert not solved(comparison)
    assert title(comparison) == "No model solves this task"
    assert "no model solves any of 120 held-out problems (95 % interval 0.0 to 3.1 %)" in findings(comparison)[1]
    assert "The model does not solve the task" in findings(comparison)[1]
    assert comparison.pair("dpo", "grpo").adjusted == 1.0


def test_the_headline_is_one_measure_for_ranking_tests_and_words(tmp_path: Path) -> None:
    build(tmp_path, algorithms=("dpo", "grpo"), steps=4)
    results = load(("dpo", "grpo"), (0,), tmp_path)
    sampled = compare(results, replace(QUESTION, headline="sampled"))
    rows = pq.read_table(tmp_path / "runs/evaluate/grpo-0/artifacts/predictions.parquet").to_pylist()
    by_hand = np.mean([row["reward_answer"] for row in rows if row["sample"] > 0])
    level = sampled.of("grpo").headline
    assert level.value == pytest.approx(by_hand)
    assert sampled.of("grpo").greedy.value == pytest.approx(91 / 120)
    assert sampled.pair("grpo", "sft").test.method == "sign-flip permutation over prompts"
    said = " ".join(findings(sampled))
    assert (
        f"grpo has the highest sampled accuracy of the ranked algorithms: {100 * by_hand:.1f} % of its sampled answers"
        in said
    )
    assert json.loads(comparison_json(sampled))["headline"] == "sampled_accuracy"


def test_another_order_by_the_other_measure_is_said(tmp_path: Path) -> None:
    comparison = compared(tmp_path, algorithms=("ppo", "grpo"))
    ppo, grpo = comparison.of("ppo"), comparison.of("grpo")
    assert other_measure(comparison, grpo) is None
    better = replace(ppo, sampled=replace(ppo.headline, value=0.9))
    assert other_measure(replace(comparison, summaries=[better, grpo]), grpo) == (
        f"By sampled accuracy ppo would rank first: 90.0 % against {100 * grpo.sampled.value:.1f} % of grpo."
        " The title follows report.headline: greedy."
    )


def test_equal_models_are_called_equal_and_nothing_wins_at_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in RATES:
        monkeypatch.setitem(RATES, name, -1.0)
    # with 12 prompts the interval of 0 % reaches above 5 %, but nothing was solved
    comparison = compared(tmp_path, algorithms=("dpo", "grpo"), prompts=12)
    assert comparison.of("dpo").headline.high > 0.05
    assert title(comparison) == "No model solves this task"
    assert json.loads(comparison_json(comparison))["best"] is None
    # of 12 prompts none differs: 1 - .025^(1/12)
    level = "Against SFT (0.0 %) dpo is level (95 % interval of the difference -26.5 to +26.5); "
    assert any(sentence.startswith(level) for sentence in findings(comparison))
    assert "−26.5 to +26.5" in rendered(tmp_path, comparison, ("dpo", "grpo"))


def rendered(
    folder: Path, comparison: Comparison, algorithms: tuple[str, ...], seeds: tuple[int, ...] = (0,), *more: str
) -> str:
    results = load(algorithms, seeds, folder)
    blank = Picture("x", "x", "x", {"light": b"", "dark": b""}, (1, 1))
    drawn = dict.fromkeys(("accuracy", "differences", "rewards", "against_tokens", *more), blank)
    return html(results, comparison, drawn, 2, 0)


def test_prompts_in_groups_are_compared_over_groups(tmp_path: Path) -> None:
    compared(tmp_path, algorithms=("dpo", "grpo"), seeds=(0, 3))
    for seeds in ((0, 3), (0,)):
        results = load(("dpo", "grpo"), seeds, tmp_path)
        groups = tuple(f"text {i // 10}" for i in range(120))
        grouped = [replace(model, predictions=replace(model.predictions, groups=groups)) for model in results.models]
        comparison = compare(replace(results, models=grouped), QUESTION)
        test, both = comparison.pair("grpo", "sft").test, greedy(results.of("grpo"), "answer")
        by_hand = crossed_difference(both, greedy(results.of("sft"), "answer"), groups=groups)
        assert (test.p, test.difference.low, test.difference.high) == (by_hand.p, by_hand.low, by_hand.high)
        assert "12 groups of prompts" in test.method
        level = crossed_mean(both, groups=groups)
        assert (comparison.of("grpo").headline.low, comparison.of("grpo").greedy.high) == (level.low, level.high)


def test_a_second_task_is_a_column_if_it_was_measured(tmp_path: Path) -> None:
    before = compared(tmp_path, algorithms=("dpo", "grpo"), seeds=(0, 3))
    assert before.of("grpo").second_task is None
    assert "Second task" not in rendered(tmp_path, before, ("dpo", "grpo"), (0, 3))
    results = load(("dpo", "grpo"), (0, 3), tmp_path)
    levels = {"base": 0.0, "sft": 0.75, "dpo-0": 0.7, "dpo-3": 0.6, "grpo-0": 0.25, "grpo-3": 0.15}
    for model in results.models:
        model.metrics["second_task/accuracy"] = levels[model.name]
    comparison = compare(results, QUESTION)
    found = {row.name: row.second_task for row in comparison.summaries}
    assert found == pytest.approx({"base": 0.0, "sft": 0.75, "dpo": 0.65, "grpo": 0.2})
    assert json.loads(comparison_json(comparison))["models"]["grpo"]["second_task_accuracy"] == pytest.approx(0.2)
    page = rendered(tmp_path, comparison, ("dpo", "grpo"), (0, 3))
    assert "which nothing trains on; a fall shows forgetting" in page
    assert "<td>20.0 %</td>" in page
    for model in results.models:  # of a graded judge
        model.metrics["second_task/accuracy"] = 10 * levels[model.name]
    graded = rendered(tmp_path, compare(results, QUESTION), ("dpo", "grpo"), (0, 3))
    assert "<td>2.000</td>" in graded
    assert "<td>7.500</td>" in graded


def test_a_band_over_seeds_is_the_t_interval_of_their_mean() -> None:
    a = (np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    b = (np.array([1.0, 2.0]), np.array([3.0, 2.0]))
    steps, low, high = seed_band([a, b])
    # mean 2, standard error sqrt(2)/sqrt(2) = 1, t(1 degree of freedom, 97.5 %) = 12.706
    assert (steps.tolist(), low[0], high[0]) == (
        [1, 2],
        pytest.approx(2 - 12.706, abs=1e-3),
        pytest.approx(2 + 12.706, abs=1e-3),
    )
    assert low[1] == high[1] == 2


def test_a_lead_within_chance_is_not_called_a_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RATES, "grpo", 0.74)
    monkeypatch.setitem(RATES, "ppo", 0.75)
    close = compared(tmp_path / "close", algorithms=("ppo", "grpo"))
    assert re.fullmatch(
        r"In this run with one seed, \w+ beats SFT; (ppo and grpo|grpo and ppo) cannot be told apart",
        title(close),
    )
    assert "so these data do not say which is better" in findings(close)[3]
    monkeypatch.setitem(RATES, "sft", 0.9)
    assert (
        title(compared(tmp_path / "worse", algorithms=("dpo",), seeds=(0, 1)))
        == "No algorithm improved on supervised fine-tuning"
    )


def test_partial_credit_and_a_reward_that_was_never_known(tmp_path: Path) -> None:
    """No pass@k, no McNemar, no curve of reward against KL, a judge that always failed: the page still shows the rest."""
    build(tmp_path, algorithms=("dpo",), prompts=30, samples=2, steps=3)
    for model in ("base", "sft", "dpo-0"):
        path = tmp_path / "runs" / "evaluate" / model / "artifacts" / "predictions.parquet"
        rows = pq.read_table(path).to_pylist()
        changed = [row | {"reward_answer": row["reward_answer"] / 2, "reward_rm": None} for row in rows]
        if model == "base":  # right or wrong, and one answer without a reward
            changed = [row | {"reward_rm": None} for row in rows]
            changed[1]["reward_answer"] = None
        pq.write_table(pa.Table.from_pylist(changed), path)
    results = load(("dpo",), (0,), tmp_path)
    comparison = compare(results, replace(QUESTION, pass_k=(1, 2)))
    assert comparison.of("dpo").pass_at == {1: None, 2: None}
    assert comparison.of("dpo").rewards["rm"] is None
    assert comparison.pair("dpo", "sft").test.method == "sign-flip permutation over prompts"
    write(tmp_path / "report", results, comparison, 2, 0)
    text = Text((tmp_path / "report" / "index.html").read_text(encoding="utf-8")).text
    assert "No algorithm samples during training" in text
    assert "the 1 test made here" in text
    assert "rm missing" in text
    # half points are no right answers, and levels are means and not shares
    level, before = (comparison.of(name).headline for name in ("dpo", "sft"))
    assert f"the mean reward answer of its greedy answers to 30 held-out problems is {level.value:.3f}" in text
    assert f"Against SFT ({before.value:.3f}) dpo is level" in text
    assert "are right" not in text
    assert "base: pass@2 leaves out 1 prompt of its runs with fewer than 2 known answers" in text
    assert "pass@1 leaves out" not in text
    assert not (tmp_path / "report" / "over_optimisation.png").exists()


def test_equal_levels_share_the_first_place_and_a_graded_reward_below_zero_is_no_failure(tmp_path: Path) -> None:
    build(tmp_path, algorithms=("grpo", "ppo"), steps=2, prompts=4, samples=2)
    for path in (tmp_path / "runs" / "evaluate").glob("*/artifacts/predictions.parquet"):
        low = path.parts[-3] in ("base", "sft")
        rows = [row | {"reward_answer": -3.0 if low else -2.0} for row in pq.read_table(path).to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows), path)
    comparison = compare(load(("grpo", "ppo"), (0,), tmp_path), QUESTION)
    assert "No model solves" not in title(comparison)
    assert findings(comparison)[1].startswith(
        "grpo and ppo share the highest greedy accuracy of the algorithms: the mean reward answer of their greedy answers to 4 held-out"
        " problems is -2.000"
    )
    assert places(["grpo", "ppo", "dpo"], {}, {"grpo": -2.0, "ppo": -2.0, "dpo": -3.0}) == {
        "grpo": "1 of 3",
        "ppo": "1 of 3",
        "dpo": "3 of 3",
    }


def test_runs_that_are_missing_are_named(tmp_path: Path) -> None:
    build(tmp_path, algorithms=("grpo",), steps=2, prompts=4)
    with pytest.raises(DataError, match=r"do not exist: runs/align/rloo-0, runs/evaluate/rloo-0. Run `dvc repro`"):
        load(("grpo", "rloo"), (0,), tmp_path)


def test_models_that_answered_other_prompts_are_not_compared(tmp_path: Path) -> None:
    build(tmp_path, algorithms=("grpo",), steps=2, prompts=6)
    path = tmp_path / "runs" / "evaluate" / "sft" / "artifacts" / "predictions.parquet"
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"prompt": row["prompt"] + "?"} for row in rows]), path)
    with pytest.raises(DataError, match="runs/evaluate/sft and runs/evaluate/base answer different prompts"):
        load(("grpo",), (0,), tmp_path)


def test_predictions_without_a_column_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"prompt_id": 1, "sample": 0}]), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="the columns prompt, answer, completion, tokens"):
        predictions(tmp_path / "p.parquet")


def test_rows_of_predictions_may_come_in_any_order(tmp_path: Path) -> None:
    build(tmp_path, algorithms=("grpo",), steps=2, prompts=6)
    path = tmp_path / "runs" / "evaluate" / "sft" / "artifacts" / "predictions.parquet"
    ordered = predictions(path)
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows[::-1]), path)
    shuffled = predictions(path)
    assert shuffled.completions == ordered.completions
    assert all(np.array_equal(shuffled.numbers[n], ordered.numbers[n], equal_nan=True) for n in ordered.numbers)


def test_examples_show_disagreement_and_failures_of_the_aligned_models(tmp_path: Path) -> None:
    results = load(("grpo",), (0,), build(tmp_path, algorithms=("grpo",), steps=2))
    shown = examples(results, QUESTION, 6, 0)
    aligned = [[card.mark for card in example.cards if card.group == "grpo"] for example in shown]
    # one aligned model cannot disagree with itself: the places go to problems that it fails and to others
    assert {example.why for example in shown} == {
        "selected because every aligned model fails",
        "selected from problems with equal scores",
    }
    assert aligned[:2] == [["wrong"]] * 2
    assert shown == examples(results, QUESTION, 6, 0)
    assert shown != examples(results, QUESTION, 6, 1)


def test_curves_of_seeds_meet_at_shared_steps() -> None:
    a = (np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))
    b = (np.array([2.0, 3.0, 4.0]), np.array([4.0, 5.0, 6.0]))
    steps, values = seed_mean([a, b])
    assert (steps.tolist(), values.tolist()) == ([2, 3], [3, 4])
    assert running_mean(np.array([1.0, np.nan, 3.0, 5.0]), 2).tolist() == [1, 1, 3, 4]


def test_small_p_values_are_given_as_bounds() -> None:
    assert [p_value(p) for p in (0.5, 0.0123, 0.0004, 1e-9)] == ["p = 0.500", "p = 0.012", "p < 0.001", "p < 0.0001"]

"""The report: its numbers, its words, its safety and its determinism, over runs whose true accuracies are known."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.report.analysis import Comparison, Question, compare, greedy, wins
from pipelines.report.curves import running_mean, seed_band, seed_mean
from pipelines.report.load import load, predictions
from pipelines.report.page import Picture
from pipelines.report.page import page as html
from pipelines.report.samples import examples
from pipelines.report.tables import comparison_json
from pipelines.report.words import entropy_kept, findings, other_measure, p_value, solved, title
from pipelines.report.write import write
from posttrain.errors import DataError
from posttrain.evaluation.crossed import crossed_difference, crossed_mean
from posttrain.evaluation.statistics import Interval, Resampling, mcnemar, wilson
from tests.pipelines.synthetic_runs import ATTACK, RATES, build

QUESTION = Question("answer", ("answer", "rm"), ("rm",), (1, 4), Resampling(400, 0.95, 0), headline="greedy")


def run_compare(folder: Path, root: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(root), "POSTTRAIN_FOLLOWER": "1"}
    command = [sys.executable, "-m", "pipelines.compare"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A project after `python -m pipelines.compare`."""
    folder = build(tmp_path_factory.mktemp("project"))
    shipped = (root / "params.yaml").read_text(encoding="utf-8")
    chosen, count = re.subn(r"algorithms: \[.*?\]", "algorithms: [dpo, grpo, ppo]", shipped, count=1)
    assert count == 1
    # the greedy answers' numbers are written by hand below
    chosen = chosen.replace("headline: sampled ", "headline: greedy ")
    assert "headline: greedy" in chosen
    (folder / "params.yaml").write_text(chosen, encoding="utf-8")
    done = run_compare(folder, root)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def page(project: Path) -> str:
    return (project / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def numbers(project: Path) -> Any:
    return json.loads((project / "report" / "comparison.json").read_text(encoding="utf-8"))


class Text(HTMLParser):
    """What a reader sees, and the tags and addresses of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.parts))


def greedy_by_hand(project: Path, model: str) -> list[float]:
    rows = pq.read_table(project / "runs" / "evaluate" / model / "artifacts" / "predictions.parquet").to_pylist()
    return [row["reward_answer"] for row in rows if row["sample"] == 0]


def test_accuracies_are_shares_of_right_greedy_answers_with_wilson_intervals(project: Path, numbers: Any) -> None:
    assert list(numbers["models"]) == ["base", "sft", "dpo", "grpo", "ppo"]
    for name, run in (("base", "base"), ("sft", "sft"), ("grpo", "grpo-0")):
        right = greedy_by_hand(project, run)
        accuracy = numbers["models"][name]["accuracy"]
        assert accuracy["mean"] == pytest.approx(sum(right) / 120)
        assert (accuracy["low"], accuracy["high"]) == pytest.approx(wilson(sum(right), 120))
        assert abs(accuracy["mean"] - RATES[name]) < 0.1


def test_pairs_are_tested_prompt_by_prompt_and_corrected(project: Path, numbers: Any) -> None:
    pairs = {(pair["a"], pair["b"]): pair for pair in numbers["pairs"]}
    assert list(pairs) == [
        ("dpo", "sft"),
        ("grpo", "sft"),
        ("ppo", "sft"),
        ("dpo", "grpo"),
        ("dpo", "ppo"),
        ("grpo", "ppo"),
    ]
    grpo, sft = greedy_by_hand(project, "grpo-0"), greedy_by_hand(project, "sft")
    gained = sum(g > s for g, s in zip(grpo, sft, strict=True))
    lost = sum(g < s for g, s in zip(grpo, sft, strict=True))
    pair = pairs["grpo", "sft"]
    assert (pair["only_a"], pair["only_b"], pair["test"]) == (gained, lost, "exact McNemar")
    assert pair["p"] == pytest.approx(mcnemar(gained, lost))
    assert pair["difference"]["mean"] == pytest.approx((gained - lost) / 120)
    worst = max(numbers["pairs"], key=lambda p: p["p"])
    assert worst["p_holm"] == worst["p"]
    assert all(pair["p"] <= pair["p_holm"] <= min(1, 6 * pair["p"]) for pair in numbers["pairs"])


def test_the_page_says_who_won_and_who_over_optimised(page: str, numbers: Any) -> None:
    assert numbers["title"] == "In this run, grpo wins; one training seed allows no more"
    said = " ".join(numbers["findings"])
    assert "grpo has the highest greedy accuracy of the algorithms: it solves 75.8 % of 120 held-out problems" in said
    assert "the difference is significant (exact McNemar, Holm-corrected p < 0.0001)" in said
    assert "ppo made the model worse than SFT, by 14.2 points" in said
    assert "ppo over-optimised the reward model: its score rose from 0.10 (SFT) to 3.00" in said
    assert numbers["findings"][0].startswith("No statement about training is possible: there is one training seed")
    text = Text(page).text
    for sentence in numbers["findings"]:
        assert sentence in text.replace("\u00a0", " ")


def test_what_was_not_measured_is_not_invented(page: str, numbers: Any) -> None:
    assert numbers["cost"]["dpo"] == {
        "runs": 1,
        "tokens_sampled": None,
        "tokens_trained": 40_000,
        "optimiser_steps": 40,
    }
    assert numbers["cost"]["grpo"]["tokens_sampled"] == 5120 * 40
    assert numbers["cost"]["ppo"]["optimiser_steps"] == 80  # two epochs over every batch
    assert numbers["cost"]["sft"] == {
        "runs": 1,
        "tokens_sampled": None,
        "tokens_trained": 90_000,
        "optimiser_steps": 10,
    }
    assert numbers["models"]["base"]["reward"]["rm"]["missing"] == 4
    text = Text(page).text
    assert "dpo: these do not sample during training" in text
    assert "Journal metric reward/rm/mean. Not logged by dpo." in text
    assert "base: reward rm is missing for 4 sampled answers" in text


def test_behaviour_is_measured_on_sampled_answers(numbers: Any) -> None:
    models = numbers["models"]
    assert models["sft"]["kl_to_sft"]["mean"] == 0
    assert models["ppo"]["reward"]["rm"]["mean"] == pytest.approx(3.0, abs=0.05)
    assert models["dpo"]["preference_accuracy"] == pytest.approx(0.625)
    assert models["grpo"]["pass_at_k"]["4"]["mean"] > models["grpo"]["pass_at_k"]["1"]["mean"]
    assert models["grpo"]["pass_at_k"]["1"]["mean"] == pytest.approx(models["grpo"]["reward"]["answer"]["mean"])
    heldout = numbers["reward_model"]["heldout_accuracy"]
    assert (heldout["low"], heldout["high"]) == pytest.approx(wilson(90, 100))


def test_win_rates_count_pairs_of_answers_to_one_prompt_with_ties_as_half() -> None:
    nan = float("nan")
    values, others = np.array([[1.0, 0.0], [1.0, nan], [nan, nan]]), np.array([[0.0, 0.0], [1.0, nan], [1.0, 0.0]])
    # 1 beats two zeros and 0 ties with both; one tie alone; nothing known
    assert wins(values, others)[:2].tolist() == [0.75, 0.5]
    assert np.isnan(wins(values, others)[2])


def test_win_rates_are_against_the_supervised_models_samples(project: Path, numbers: Any) -> None:
    rewards: dict[str, dict[int, list[float]]] = {"sft": {}, "grpo-0": {}}
    for name, found in rewards.items():
        path = project / "runs" / "evaluate" / name / "artifacts" / "predictions.parquet"
        for row in pq.read_table(path).to_pylist():
            if row["sample"] > 0:
                found.setdefault(row["prompt_id"], []).append(row["reward_answer"])
    by_prompt = []
    for prompt, ours in rewards["grpo-0"].items():
        pairs = [(a, b) for a in ours for b in rewards["sft"][prompt]]
        by_prompt.append(sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs))
    interval = numbers["models"]["grpo"]["win_rate_against_sft"]
    assert interval["mean"] == pytest.approx(sum(by_prompt) / len(by_prompt), abs=1e-5)
    assert interval["low"] < interval["mean"] < interval["high"]
    assert numbers["models"]["sft"]["win_rate_against_sft"] is None


def test_sampled_text_is_shown_and_never_interpreted(page: str) -> None:
    seen = Text(page)
    assert ATTACK in seen.text
    assert not {"script", "link", "object", "embed", "form"} & set(seen.tags)
    assert "&lt;script&gt;alert(" in page
    assert "default-src 'none'" in page


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    assert "http://" not in page
    assert "https://" not in page
    outside = [a for a in Text(page).addresses if not a.startswith(("data:image/png;base64,", "#"))]
    assert set(outside) == {
        "comparison.json", "accuracy.csv", "pairwise.csv", "curves.csv",
    }  # fmt: skip
    assert "@import" not in page
    assert "url(" not in page


def test_a_second_run_writes_the_same_bytes(project: Path, root: Path) -> None:
    def contents() -> dict[str, bytes]:
        files = sorted([*(project / "report").iterdir(), *(project / "runs" / "compare").rglob("*.*")])
        return {file.relative_to(project).as_posix(): file.read_bytes() for file in files}

    before = contents()
    (project / "report" / "leftover.png").write_bytes(b"of an older report")
    done = run_compare(project, root)
    assert done.returncode == 0, done.stderr
    assert contents() == before
    assert {"report/index.html", "report/accuracy.png", "report/over_optimisation.png"} <= before.keys()
    assert all(data.startswith(b"\x89PNG") for name, data in before.items() if name.endswith(".png"))
    assert not any(b"Matplotlib version" in data for name, data in before.items() if name.endswith(".png"))


def test_tables_hold_the_journals_and_the_tests(project: Path, numbers: Any) -> None:
    def rows(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader((project / "report" / name).read_text().splitlines()))

    assert [row["model"] for row in rows("accuracy.csv")] == ["base", "sft", "dpo", "grpo", "ppo"]
    assert [float(row["p_holm"]) for row in rows("pairwise.csv")] == [pair["p_holm"] for pair in numbers["pairs"]]
    curves = rows("curves.csv")
    assert {row["model"] for row in curves} == {"sft", "reward", "dpo", "grpo", "ppo"}
    sampled = [float(r["value"]) for r in curves if r["model"] == "ppo" and r["metric"] == "tokens/sampled"]
    assert sampled == [5120.0 * step for step in range(1, 41)]


def test_the_markdown_table_says_what_the_json_says(project: Path, numbers: Any) -> None:
    lines = (project / "report" / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# {numbers['title']}"
    rows = {cells[0]: cells for line in lines if line.startswith("| ") for cells in [line.strip("| ").split(" | ")]}
    assert set(numbers["models"]) <= set(rows)
    accuracy, steps = numbers["models"]["grpo"]["accuracy"], numbers["cost"]["grpo"]["optimiser_steps"]
    assert rows["grpo"][2] == f"{accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
    pair = next(p for p in numbers["pairs"] if {p["a"], p["b"]} == {"grpo", "sft"})
    difference = pair["difference"]["mean"] * (1 if pair["a"] == "grpo" else -1)
    assert rows["grpo"][3].startswith(f"{difference:+.3f} [")
    assert rows["base"][3] == rows["sft"][3] == rows["sft"][4] == "—"
    assert rows["grpo"][4].startswith(f"{numbers['models']['grpo']['win_rate_against_sft']['mean']:.3f} [")
    assert rows["grpo"][9] == f"{steps:,.0f}"


def test_the_step_reports_its_results_and_leaves_clock_times_out(project: Path, page: str) -> None:
    metrics = json.loads((project / "runs" / "compare" / "metrics.json").read_text())
    assert metrics["headline"]["grpo"] == pytest.approx(91 / 120)
    assert metrics["pairs"]["tested"] == 6
    assert (project / ".posttrain" / "costs" / "index.html").is_file()
    assert not re.search(r"20\d\d-\d\d-\d\d", page)


def test_comparing_needs_no_model_library(root: Path) -> None:
    code = "import sys, pipelines.compare; print(sorted({'torch', 'transformers', 'mlflow', 'prefect'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


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
    assert row.accuracy.value == pytest.approx(both.mean())
    assert row.by_seed == pytest.approx(tuple(both.mean(axis=0)))
    level = crossed_mean(both)
    assert (row.accuracy.low, row.accuracy.high) == (level.low, level.high)
    test, by_hand = comparison.pair("dpo", "grpo").test, crossed_difference(greedy(results.of("dpo"), "answer"), both)
    assert (test.p, test.difference.low, test.difference.high) == (by_hand.p, by_hand.low, by_hand.high)
    assert test.method == f"t over seeds and prompts, {by_hand.df:.1f} degrees of freedom"
    assert comparison.costs[-1].runs == 2
    assert findings(comparison)[0].startswith(
        "2 training seeds per algorithm: intervals and tests cover other seeds and other prompts"
    )
    assert "in this run" not in title(comparison).lower()


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
    assert sampled.of("grpo").accuracy.value == pytest.approx(91 / 120)
    assert sampled.pair("grpo", "sft").test.method == "sign-flip permutation over prompts"
    said = " ".join(findings(sampled))
    assert (
        f"grpo has the highest sampled accuracy of the algorithms: {100 * by_hand:.1f} % of its sampled answers" in said
    )
    assert json.loads(comparison_json(sampled))["headline"] == "sampled"


def test_another_order_by_the_other_measure_is_said(tmp_path: Path) -> None:
    comparison = compared(tmp_path, algorithms=("dpo", "grpo"))
    dpo, grpo = comparison.of("dpo"), comparison.of("grpo")
    assert other_measure(comparison, grpo) is None
    better = replace(dpo, rewards=dpo.rewards | {"answer": replace(dpo.headline, value=0.9)})
    assert other_measure(replace(comparison, summaries=[better, grpo]), grpo) == (
        f"By sampled accuracy dpo would rank first: 90.0 % against {100 * grpo.rewards['answer'].value:.1f} % of grpo."
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
    assert "No difference is seen between dpo and SFT (0.0 %)." in findings(comparison)
    assert "no difference seen" in rendered(tmp_path, comparison, ("dpo", "grpo"))


def rendered(folder: Path, comparison: Comparison, algorithms: tuple[str, ...]) -> str:
    results = load(algorithms, (0,), folder)
    blank = Picture("x", "x", "x", {"light": b"", "dark": b""}, (1, 1))
    drawn = dict.fromkeys(("accuracy", "differences", "rewards", "against_tokens"), blank)
    return html(results, comparison, drawn, 2, 0)


def test_the_page_has_two_languages_and_needs_no_script(page: str, numbers: Any) -> None:
    text = Text(page).text
    assert "仅就本次运行:grpo 胜出;只有一个训练种子,不能说明更多" in text
    assert "grpo 的贪心准确率最高:75.8 %" in text
    assert re.search(r'#zh:checked ~ \.body \[lang="en"\].*display: none', page)
    assert page.count('<span lang="en">') == page.count('<span lang="zh">')


def test_the_page_has_hyper_parameters_and_the_first_screen_has_the_cost(project: Path, page: str) -> None:
    first = Text(page[: page.index("<nav")]).text
    # grpo sampled 5120 and trained on 1000 tokens in each of 40 steps
    assert f"{40 * 6120:,}tokens sampled and trained on" in first
    assert "120 held-out problems" in first
    assert '<th scope="row">kl_coefficient</th><td>–</td><td>0.04</td><td>0.2</td>' in page
    copied = (project / ".posttrain" / "report.html").read_text(encoding="utf-8")
    assert "CPU cores" in copied
    assert "this machine:" not in copied
    assert "iframe" not in page + copied


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
    monkeypatch.setitem(RATES, "dpo", 0.75)
    close = compared(tmp_path / "close", algorithms=("dpo", "grpo"))
    assert re.fullmatch(
        r"In this run, \w+ beats SFT; (dpo and grpo|grpo and dpo) cannot be told apart; one training seed allows no more",
        title(close),
    )
    assert "so these data do not say which is better" in findings(close)[3]
    monkeypatch.setitem(RATES, "sft", 0.9)
    assert (
        title(compared(tmp_path / "worse", algorithms=("dpo",), seeds=(0, 1)))
        == "No algorithm improved on supervised fine-tuning"
    )


def test_partial_credit_and_a_reward_that_was_never_known(tmp_path: Path) -> None:
    """No pass@k, no McNemar, no curve of reward against KL, a judge that always failed: the page still says what is known."""
    build(tmp_path, algorithms=("dpo",), prompts=30, samples=2, steps=3)
    for model in ("base", "sft", "dpo-0"):
        path = tmp_path / "runs" / "evaluate" / model / "artifacts" / "predictions.parquet"
        rows = pq.read_table(path).to_pylist()
        changed = [row | {"reward_answer": row["reward_answer"] / 2, "reward_rm": None} for row in rows]
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
    assert not (tmp_path / "report" / "over_optimisation.png").exists()


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

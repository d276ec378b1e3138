"""The report: its numbers, pages, safety and determinism, over runs whose true accuracies are known."""

import csv
import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.runtime.journal import read
from pipelines.runtime.ranking import RECORD, decode
from posttrain.evaluation.statistics import mcnemar, wilson
from tests.pipelines.read_html import Text
from tests.pipelines.synthetic_runs import ATTACK, RATES, build
from tests.reliability.workspace import Warm
from tests.test_translations import half_width


def run_compare(folder: Path, root: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(root), "POSTTRAIN_FOLLOWER": "1"} | extra
    command = [sys.executable, "-m", "pipelines.compare"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)


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


def test_the_journal_carries_the_place_of_each_run(project: Path, numbers: Any) -> None:
    entry = next(r["values"][RECORD] for r in read(project / "runs/compare/journal.jsonl") if r["kind"] == "tags")
    places = decode(entry)
    expected = {f"align-{name}-0-{'k' * 16}": f"{place} of 2" for place, name in enumerate(numbers["ranked"], 1)}
    ((left, cells),) = numbers["not_ranked"].items()
    expected[f"align-{left}-0-{'k' * 16}"] = f"not ranked: {', '.join(cells)}"
    assert {run: place.words for run, place in places.items()} == expected
    assert {place.measure for place in places.values()} == {"greedy_accuracy"}
    assert [run for run, place in places.items() if not place.ranked] == [f"align-{left}-0-{'k' * 16}"]


def greedy_by_hand(project: Path, model: str) -> list[float]:
    rows = pq.read_table(project / "runs" / "evaluate" / model / "artifacts" / "predictions.parquet").to_pylist()
    return [row["reward_answer"] for row in rows if row["sample"] == 0]


def test_accuracies_are_shares_of_right_greedy_answers_with_wilson_intervals(project: Path, numbers: Any) -> None:
    assert list(numbers["models"]) == ["base", "sft", "dpo", "grpo", "ppo"]
    for name, run in (("base", "base"), ("sft", "sft"), ("grpo", "grpo-0")):
        right = greedy_by_hand(project, run)
        accuracy = numbers["models"][name]["greedy_accuracy"]
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
    assert numbers["title"] == ("In this run with one seed, grpo wins; dpo had a different protocol and is not ranked")
    said = " ".join(numbers["findings"])
    assert (
        "grpo has the highest greedy accuracy of the ranked algorithms: it solves 75.8 % of 120 held-out problems"
        in said
    )
    assert "the difference is significant (exact McNemar, Holm-corrected p < 0.0001)" in said
    assert "ppo made the model worse than SFT, by 14.2 points" in said
    assert "ppo over-optimised the reward model: its score rose from 0.10 (SFT) to 3.00" in said
    assert numbers["findings"][0].startswith(
        "One training seed per algorithm: the result holds for the models of this run"
    )
    text = Text(page).text
    for sentence in numbers["findings"]:
        assert sentence in text.replace("\u00a0", " ")


def test_algorithms_under_other_protocols_are_marked_and_not_ranked(page: str, numbers: Any) -> None:
    assert numbers["ranked"] == ["grpo", "ppo"]
    assert numbers["protocols"]["dpo"] == {
        "signal": "logged pairs",
        "start": "models/sft",
        "digest": "",
        "tuned": "as given",
        "spent": None,
        "prompts": "",
    }
    assert numbers["protocols"]["ppo"]["spent"] == 5120 * 40
    assert (
        "Only algorithms with the same start, training reward, prompts and tuning, and equal tokens sampled are ranked together. Not"
        " ranked with grpo and ppo: dpo (trained on logged pairs)."
    ) in numbers["findings"]
    assert '<mark><span lang="en">logged pairs</span>' in page
    assert page.count("<mark>204,800</mark>") == 0


def test_a_run_that_hacks_the_reward_model_is_named_with_the_step(numbers: Any) -> None:
    """Find it in the synthetic ppo, which falls from .45 to .3 while its score rises from .1 to 3; grpo gains by both."""
    (hacked,) = numbers["reward_hacking"]["ppo"]["hacked"]
    assert numbers["reward_hacking"]["grpo"] == {"runs": 1, "hacked": []}
    assert "dpo" not in numbers["reward_hacking"]
    assert 5 < hacked["began"] < hacked["noticed"] < 40
    assert hacked["truth"] < 0.8 * hacked["level"]
    (said,) = (sentence for sentence in numbers["findings"] if "hacked" in sentence)
    assert said.startswith(
        f"ppo hacked the reward model rm in 1 of 1 run: from step {hacked['began']} the true reward fell"
    )


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
    assert models["dpo"]["answers_not_found"] == pytest.approx(0.125)
    assert models["grpo"]["pass_at_k"]["4"]["mean"] > models["grpo"]["pass_at_k"]["1"]["mean"]
    assert models["grpo"]["pass_at_k"]["1"]["mean"] == pytest.approx(models["grpo"]["sampled_accuracy"]["mean"])
    heldout = numbers["reward_model"]["heldout_accuracy"]
    assert (heldout["low"], heldout["high"]) == pytest.approx(wilson(90, 100))


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


def test_a_second_run_writes_the_same_bytes(project: Path, root: Path, warm: Warm) -> None:
    def contents() -> dict[str, bytes]:
        files = sorted([*(project / "report").iterdir(), *(project / "runs" / "compare").rglob("*.*")])
        return {file.relative_to(project).as_posix(): file.read_bytes() for file in files}

    before = contents()
    (project / "report" / "leftover.png").write_bytes(b"of an older report")
    done = run_compare(project, root, POSTTRAIN_WARM=str(warm.socket))
    assert done.returncode == 0, done.stderr
    assert contents() == before
    assert {"report/index.html", "report/accuracy.png", "report/over_optimisation.png"} <= before.keys()
    assert all(data.startswith(b"\x89PNG") for name, data in before.items() if name.endswith(".png"))
    assert not any(b"Matplotlib version" in data for name, data in before.items() if name.endswith(".png"))


def test_tables_hold_the_journals_and_the_tests(project: Path, numbers: Any) -> None:
    def rows(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader((project / "report" / name).read_text().splitlines()))

    levels = {row["model"]: row for row in rows("accuracy.csv")}
    assert list(levels) == ["base", "sft", "dpo", "grpo", "ppo"]
    for name in ("sampled_accuracy", "greedy_accuracy"):
        shown = [float(levels["grpo"][name + end]) for end in ("", "_low", "_high")]
        assert shown == [numbers["models"]["grpo"][name][end] for end in ("mean", "low", "high")]
    assert levels["grpo"]["greedy_accuracy_method"] == "Wilson"
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
    accuracy, steps = numbers["models"]["grpo"]["greedy_accuracy"], numbers["cost"]["grpo"]["optimiser_steps"]
    assert rows["grpo"][2] == f"{accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
    pair = next(p for p in numbers["pairs"] if {p["a"], p["b"]} == {"grpo", "sft"})
    difference = pair["difference"]["mean"] * (1 if pair["a"] == "grpo" else -1)
    assert rows["grpo"][3].startswith(f"{difference:+.3f} [")
    assert rows["base"][3] == rows["sft"][3] == rows["sft"][4] == "—"
    assert rows["grpo"][4].startswith(f"{numbers['models']['grpo']['win_rate_against_sft']['mean']:.3f} [")
    assert rows["grpo"][9] == f"{steps:,.0f}"


def test_the_step_reports_its_results_and_leaves_clock_times_out(project: Path, page: str) -> None:
    metrics = json.loads((project / "runs" / "compare" / "metrics.json").read_text())
    assert metrics["greedy_accuracy"]["grpo"] == pytest.approx(91 / 120)
    assert metrics["pairs"]["tested"] == 6
    assert (project / ".posttrain" / "costs" / "index.html").is_file()
    assert not re.search(r"20\d\d-\d\d-\d\d", page)


def test_comparing_needs_no_model_library(root: Path) -> None:
    code = "import sys, pipelines.compare; print(sorted({'torch', 'transformers', 'mlflow', 'prefect'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_page_has_two_languages_and_needs_no_script(page: str, numbers: Any) -> None:
    text = Text(page).text
    assert "仅就本次运行（一个种子）：grpo 胜出；dpo 的协议不同，不参与排名" in text
    assert "grpo 的贪心准确率最高：75.8 %" in text
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
    assert "so this file has none" in page
    assert "so this file has none" not in copied
    assert "iframe" not in page + copied


def test_chinese_texts_of_the_page_have_full_width_punctuation(page: str) -> None:
    texts = [
        unescape(re.sub(r"<[^>]+>", "", text)) for text in re.findall(r'<span lang="zh">(.*?)</span>', page, re.DOTALL)
    ]
    assert len(texts) > 60
    assert [place for text in texts for place in half_width(text)] == []


def test_answers_of_training_steps_are_on_the_page_if_a_run_kept_them(page: str) -> None:
    section = page.split('<section id="rollouts">')[1].split("</section>")[0]
    assert re.findall(r"<summary>.*?</span>(\w+)</summary>", section) == ["grpo"]
    cards = re.findall(r'<h4><span><span lang="en">(.*?)</span>.*?</h4>\n<pre>6 \+ 7 =</pre><pre>(.*?)</pre>', section)
    assert cards == [
        ("highest reward", "6 + 7 = 13"), ("highest reward", "6 + 7 = 0013"),
        ("lowest reward", "6 + 7 = 12"), ("lowest reward", "6 + 7 = 767"),
        ("most changed", "6 + 7 = 0013"), ("most changed", "6 + 7 = 13"),
        ("high score, low true reward", "6 + 7 = 767"), ("high score, low true reward", "6 + 7 = 12"),
    ]  # fmt: skip
    # log p - log p of the reference of the two tokens: -0.25 + 9
    assert "log p − log p<sub>ref</sub> 8.75" in section

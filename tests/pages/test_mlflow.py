"""MLflow's pages answer the question of a comparison: read from the page, as a browser shows it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from pipelines.tracking.store import open_client
from pipelines.tracking.views import TRAINING_PAGES
from tests.pages.browsing import DESKTOP, Site

if TYPE_CHECKING:
    from mlflow.entities import Run
    from playwright.sync_api import Page

RESULTS = "results of the algorithms side by side"


def test_the_table_groups_runs_by_algorithm_and_the_best_is_first(page: Page, site: Site) -> None:
    page.goto(site.links[RESULTS])
    page.get_by_text("Group: ppo").wait_for()
    page.get_by_text("0.75 (average)").first.wait_for()
    shown = page.inner_text("body")
    assert re.findall(r"Group: (\w+)", shown) == ["grpo", "ppo", "dpo"], "dpo has a different protocol"
    for text in ("1 of 2", "2 of 2", "not ranked"):
        assert text in shown, text
    for column in (
        "eval/greedy_accuracy",
        "eval/sampled_accuracy",
        "eval/kl_ref_k1",
        "ranked",
    ):
        assert column in shown, column
        box = page.locator("[role='columnheader']", has_text=column).last.bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= DESKTOP["width"], f"{column} is off the first screen"
    # the accuracy of grpo's runs, and of the group
    assert shown.count("0.75") >= 3
    assert "6 matching runs" in re.sub(r"\s+", " ", shown)


def test_the_charts_begin_with_the_result(page: Page, site: Site) -> None:
    page.goto(site.links["curves of the algorithms"])
    cards = page.locator("[data-testid='experiment-view-compare-runs-card']")
    # two seeds of each algorithm are one group, drawn as one line from its learning rate to its result
    parallel = cards.first
    parallel.get_by_text("Parallel Coordinates", exact=True).wait_for()
    parallel.get_by_text("optimizer.learning_rate", exact=True).wait_for()
    parallel.get_by_text("eval/sampled_accuracy", exact=True).wait_for()
    axes = parallel.inner_text().split()
    assert {"0.0002", "0.0010", "0.3", "0.7"} <= set(axes)
    assert page.get_by_text("does not support aggregated string values").count() == 0
    ranked = cards.nth(1)
    ranked.get_by_text("ranked/sampled_accuracy", exact=True).wait_for()
    ranked.get_by_text("0.75", exact=True).wait_for()
    assert {"0.75", "0.30"} <= set(ranked.inner_text().split())
    assert "0.50" not in ranked.inner_text(), "dpo is not ranked"
    bars = cards.nth(2)
    bars.get_by_text("eval/sampled_accuracy", exact=True).wait_for()
    bars.get_by_text("0.75", exact=True).wait_for()
    assert {"0.75", "0.50", "0.30"} <= set(bars.inner_text().split())
    sections = [
        name for name in ("Result on held-out problems", "Reward", "KL", "Loss") if page.get_by_text(name).count()
    ]
    assert sections[0] == "Result on held-out problems"


def recorded_runs(site: Site, wanted: str) -> tuple[str, list[Run]]:
    """Return the experiment's number and its runs that match a filter."""
    experiment = re.search(r"experiments/(\d+)", site.links[RESULTS])
    assert experiment is not None
    return experiment[1], open_client(site.project).search_runs([experiment[1]], wanted)


@pytest.mark.slow
def test_the_traces_of_a_run_are_its_first_answers_with_their_rewards(page: Page, site: Site) -> None:
    experiment, found = recorded_runs(site, "tags.stage = 'align' and tags.algorithm = 'grpo' and tags.seed = '0'")
    page.goto(f"{site.base}/#/experiments/{experiment}/runs/{found[0].info.run_id}/traces")
    page.get_by_text("0 + 0 =", exact=True).first.wait_for()
    shown = re.sub(r"\s+", " ", page.inner_text("body"))
    assert [f"{n} + {n} =" in shown for n in range(5)] == [True] * 4 + [False], "tracking.traces is 4"
    assert re.search(r"0 \+ 0 = 0 \+ 0 = [01] answer: [01]", shown)
    for column in ("Request", "Response", "answer", "rm", "total", "log_ratio"):
        assert column in shown, column
    # answers of training steps, by what they are shown for
    for text in ("6 + 7 = 13", "6 + 7 = 12", "6 + 7 = 767", "6 + 7 = 0013"):
        assert text in shown, text
    stored = open_client(site.project).search_traces(locations=[experiment], run_id=found[0].info.run_id)
    assert f"{len(stored)} of {len(stored)}" in shown


def test_a_click_on_the_experiment_opens_its_runs_and_one_more_the_comparison(page: Page, site: Site) -> None:
    page.goto(site.base)
    page.get_by_role("link", name="posttrain", exact=True).click()
    page.get_by_role("link", name="align grpo seed 1").wait_for()
    assert f"runs?{TRAINING_PAGES}" in page.url
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Compare the algorithms").click()
    opened.value.get_by_text("Group: grpo").wait_for()
    assert "viewStateShareKey=algorithms" in opened.value.url


@pytest.mark.slow
def test_no_hint_of_a_first_visit_dims_the_traces(page: Page, site: Site) -> None:
    page.goto(site.base)
    page.get_by_role("link", name="posttrain", exact=True).click()
    page.get_by_role("link", name="Traces").click()
    page.get_by_text("Detect Issues").first.wait_for()
    page.get_by_role("link", name="Runs", exact=True).click()  # a hint over the page would keep the click from it
    page.get_by_role("link", name="align grpo seed 1").wait_for()
    assert page.get_by_role("button", name="Got it").count() == 0


@pytest.mark.slow
def test_a_user_who_prefers_the_pages_for_agents_keeps_them(page: Page, site: Site) -> None:
    page.goto(site.base)
    page.get_by_text("GenAI", exact=True).click()
    page.locator("a[href='#/prompts']").wait_for()
    page.reload()
    page.locator("a[href='#/prompts']").wait_for()
    assert page.evaluate("localStorage.getItem('mlflow.workflowType_v1')") == '"genai"'


@pytest.mark.slow
def test_the_page_of_a_run_has_its_result_in_words_and_what_it_was_set_to(page: Page, site: Site) -> None:
    page.goto(site.links[RESULTS])
    page.get_by_role("link", name="align grpo seed 0").click()
    page.get_by_text("75.0 %").first.wait_for()
    page.get_by_text("kl_coefficient").first.wait_for()
    shown = re.sub(r"\s+", " ", page.inner_text("body"))
    assert "Greedy accuracy: 75.0 % (95 % interval 65.0 to 85.0 %)" in shown
    assert "python -m pipelines.align --algorithm grpo --seed 0" in shown
    assert re.search(r"kl_coefficient 0\.04", shown)
    metrics = [name for name in re.findall(r"[a-z_]+/[\w/]+(?= -?[\d.]+)", shown) if not name.startswith("system/")]
    assert metrics[0] == "eval/sampled_accuracy", "the list begins with the headline measure"


@pytest.mark.slow
def test_two_runs_side_by_side_show_what_differs(page: Page, site: Site) -> None:
    experiment, found = recorded_runs(site, "tags.seed = '0' and tags.stage = 'align'")
    runs = [run.info.run_id for run in found if run.data.tags["algorithm"] in ("grpo", "ppo")]
    page.goto(f"{site.base}/#/compare-runs?runs={json.dumps(runs)}&experiments={json.dumps([experiment])}")
    page.get_by_text("kl_coefficient").first.wait_for()
    axes = page.locator(".pcp-plot .axis-title")
    axes.filter(has_text="eval/sampled_accuracy").wait_for(state="attached")  # the plot shows the headline measure
    assert not any(name.startswith("seconds/") for name in axes.all_text_contents())
    shown = page.inner_text("body")
    assert "align grpo seed 0" in shown
    assert "align ppo seed 0" in shown
    assert re.search(r"kl_coefficient\s+(0\.04\s+0\.2|0\.2\s+0\.04)", shown)


@pytest.mark.slow
def test_the_registry_has_the_best_model_as_challenger(page: Page, site: Site) -> None:
    page.goto(site.links["versions of the model posttrain"])
    page.get_by_text("challenger").first.wait_for()
    page.get_by_role("link", name="Version 1").click()
    words = "Best of a comparison: grpo wins; dpo had a different protocol and is not ranked"
    page.get_by_text(words).first.wait_for()
    shown = page.inner_text("body")
    assert "challenger" in shown
    assert "models/align/grpo-0" in shown

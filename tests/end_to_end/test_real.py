"""Real data and a real pre-trained model, chosen only by parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.evaluation.statistics import Resampling, paired
from tests.end_to_end.conftest import Clone

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

SMALL = (
    "project.algorithms=[grpo]", "data.sft.rows=48", "data.preferences.rows=40", "data.problems.rows=32",
    "data.evaluation.rows=40", "align.on_policy.steps=2", "evaluation.samples_per_prompt=2", "evaluation.pass_k=[1,2]",
    "sft.optimizer.warmup_steps=0", "reward.optimizer.warmup_steps=0",
    "align.preference.optimizer.warmup_steps=0", "evaluation.max_new_tokens=32", "align.on_policy.max_new_tokens=32",
    "align.on_policy.prompts_per_step=4", "sft.epochs=1", "reward.epochs=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def gsm8k(new_clone: Callable[[], Clone], shared_data: Path) -> Clone:
    clone = new_clone()
    clone.configure("examples/gsm8k.yaml", *SMALL)
    return clone


def test_training_on_answers_to_the_evaluation_questions_is_refused(gsm8k: Clone) -> None:
    params = gsm8k.root / "params.yaml"
    before = params.read_text(encoding="utf-8")
    gsm8k.configure("tests/end_to_end/leak.yaml")
    try:
        done = gsm8k.run("dvc", "repro", "validate", check=False, POSTTRAIN_FOLLOWER="1")
    finally:
        params.write_text(before, encoding="utf-8")
    assert done.returncode != 0
    message = done.stdout + done.stderr
    assert "leakage" in message
    assert "preferences" in message
    assert "Janet" in message, "the message must show the first shared prompts"
    assert "Traceback" not in message
    assert not (gsm8k.root / "data" / "valid").exists()


def test_word_problems_run_to_a_report_that_admits_failure(gsm8k: Clone) -> None:
    gsm8k.repro(POSTTRAIN_FOLLOWER="1")
    metrics = json.loads((gsm8k.root / "runs/evaluate/grpo-0/metrics.json").read_text())
    assert metrics["greedy_accuracy"] <= 0.1
    assert metrics["greedy_accuracy_high"] < 0.2
    page = (gsm8k.root / "report" / "index.html").read_text(encoding="utf-8")
    assert "does not solve" in page


@pytest.mark.slow
def test_a_story_model_learns_to_mention_the_asked_word(new_clone: Callable[[], Clone], shared_data: Path) -> None:
    import pyarrow.parquet as pq

    clone = new_clone()
    clone.configure("examples/stories.yaml", "project.algorithms=[grpo]")
    clone.run("flows.compare", "--no-tracking", "evaluate@sft", "evaluate_aligned@grpo-0")

    def mentioned(model: str) -> list[list[float]]:
        table = pq.read_table(clone.root / f"runs/evaluate/{model}/artifacts/predictions.parquet").to_pylist()
        prompts = sorted({row["prompt_id"] for row in table})
        return [[r["reward_mentions"] for r in table if r["prompt_id"] == p and r["sample"] > 0] for p in prompts]

    test = paired(mentioned("grpo-0"), mentioned("sft"), Resampling(seed=0))
    assert test.difference.low > 0.05
    assert test.p < 0.01

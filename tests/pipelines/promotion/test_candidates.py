"""The gate over evaluations on disk: one that cannot be used is refused and does not stop the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import gate
from pipelines.config.params import Params, load_params, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.report.load import BENCHMARKS
from pipelines.training.benchmark_table import write_scores
from posttrain.errors import ConfigError, DataError
from posttrain.evaluation.benchmarks import BenchmarkScore
from posttrain.evaluation.statistics import Resampling

PROMPTS = 40
RESAMPLING = Resampling(1000, 0.95, 0)


def evaluation(name: str, right: list[float | None], **changes: Any) -> None:
    """runs/evaluate/NAME with one greedy and one sampled answer a prompt; `right` are the rewards of the sampled ones."""
    columns: dict[str, list[Any]] = {
        "prompt_id": [i for i in range(PROMPTS) for _ in range(2)],
        "sample": [0, 1] * PROMPTS,
        "prompt": [f"{i}+1?" for i in range(PROMPTS) for _ in range(2)],
        "answer": [str(i + 1) for i in range(PROMPTS) for _ in range(2)],
        "completion": ["x"] * 2 * PROMPTS,
        "tokens": [5] * 2 * PROMPTS,
        "truncated": [0] * 2 * PROMPTS,
        "entropy": [0.0] * 2 * PROMPTS,
        "kl": [0.0] * 2 * PROMPTS,
        "reward_answer": [value for each in right for value in (0.0, each)],
        "reward_rm": [value for each in right for value in (0.0, each)],
    } | changes
    path = gate.evaluated(name)
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({key: value for key, value in columns.items() if value is not None}), path)


@pytest.fixture
def params(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.chdir(tmp_path)
    evaluation("sft", [0.0, 1.0] * (PROMPTS // 2))
    return load_params(root / "params.yaml")


def judged(params: Params, *names: str) -> list[Any]:
    reference = gate._answers(params, "the supervised model", gate.evaluated("sft"))
    return gate._judged(params, names, reference, RESAMPLING)


def test_a_candidate_without_rewards_or_with_other_prompts_is_refused_and_the_others_are_judged(params: Params) -> None:
    evaluation("grpo-0", [1.0] * PROMPTS)
    evaluation("dpo-0", [1.0] * PROMPTS, reward_answer=None)
    evaluation("ppo-0", [None] * PROMPTS)
    evaluation("dapo-0", [1.0] * PROMPTS, answer=["1"] * 2 * PROMPTS)
    decisions = {decision.challenger: decision for decision in judged(params, "dpo-0", "ppo-0", "dapo-0", "grpo-0")}
    assert next(iter(decisions)) == "grpo-0"
    assert [name for name, decision in decisions.items() if decision.promote] == ["grpo-0"]
    assert "the evaluation of dpo-0 has no rewards answer" in decisions["dpo-0"].refusals[0]
    assert "dapo-0 answered '1+1?' (gold answer '1') where" in decisions["dapo-0"].refusals[0]
    failed = {check.name for check in decisions["ppo-0"].checks if not check.passed}
    assert failed >= {"loss", "missing"}


def test_an_evaluation_set_that_was_replaced_since_the_reference_was_judged_is_not_compared(params: Params) -> None:
    evaluation("grpo-0", [1.0] * PROMPTS, prompt=[f"{i}+2?" for i in range(PROMPTS) for _ in range(2)])
    with pytest.raises(DataError, match="no candidate can be judged: the gate compares answers to the same prompts"):
        judged(params, "grpo-0")


def benchmark(name: str, values: list[float]) -> None:
    """Write the scores of a benchmark next to the answers of a model, as an evaluation stores them."""
    score = BenchmarkScore("mine", "acc", sum(values) / len(values), tuple(values))
    write_scores(gate.evaluated(name).with_name(BENCHMARKS), [score], RESAMPLING)


def test_a_candidate_that_forgets_a_benchmark_is_refused_and_one_that_keeps_it_is_promoted(
    params: Params, root: Path
) -> None:
    tree = read_yaml(root / "params.yaml")
    tree["evaluation"]["benchmarks"] = {"tasks": ["mine"]}
    tree["gate"]["benchmarks"] = [{"task": "mine", "tolerated_loss": 0.05}]
    own = parse_params(tree, "params.yaml")
    benchmark("sft", [1.0, 0.0] * 200)
    for name, values in {"grpo-0": [0.0, 0.0] * 200, "dapo-0": [1.0, 0.0] * 200, "ppo-0": None}.items():
        evaluation(name, [1.0] * PROMPTS)
        if values is not None:
            benchmark(name, values)
    decisions = {decision.challenger: decision for decision in judged(own, "grpo-0", "dapo-0", "ppo-0")}
    assert [name for name, decision in decisions.items() if decision.promote] == ["dapo-0"]
    (words,) = decisions["grpo-0"].refusals
    assert words.startswith("acc of mine against the supervised model: -0.5, 95 % interval")
    assert "the evaluation of ppo-0 has no metric 'acc' of 'mine'; it has: none" in decisions["ppo-0"].refusals[0]
    # without gate.benchmarks the same files change nothing
    assert all(decision.promote for decision in judged(params, "grpo-0", "dapo-0", "ppo-0"))


def test_a_benchmark_of_the_gate_that_no_evaluation_runs_is_refused_at_once(root: Path) -> None:
    tree = read_yaml(root / "params.yaml")
    tree["gate"]["benchmarks"] = [{"task": "arc_eazy", "tolerated_loss": 0.05}]
    tree["evaluation"]["benchmarks"] = {"tasks": ["arc_easy"]}
    with pytest.raises(
        ConfigError, match=r"gate.benchmarks.0: 'arc_eazy' is not in evaluation.benchmarks.tasks.*arc_easy"
    ):
        parse_params(tree, "params.yaml")

"""Every preset learns the built-in task, over three seeds: docs/learning.md is the table that such a run writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.config.params import load_params
from posttrain.algorithms import OnPolicy
from posttrain.evaluation.statistics import wilson
from tests.end_to_end.conftest import Clone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]


@pytest.fixture(scope="module")
def learnt(new_clone: Callable[[], Clone]) -> Clone:
    clone = new_clone()
    clone.configure("examples/all_presets.yaml")
    clone.run("flows.compare", "--no-tracking")
    return clone


@pytest.fixture(scope="module")
def comparison(learnt: Clone) -> Any:
    return json.loads((learnt.root / "report" / "comparison.json").read_text(encoding="utf-8"))


def test_every_on_policy_preset_lifts_accuracy_over_sft_significantly(learnt: Clone, comparison: Any) -> None:
    params = load_params(learnt.root / "params.yaml")
    sampling = [name for name in params.project.algorithms if isinstance(params.algorithm(name), OnPolicy)]
    assert len(sampling) == 10
    pairs = {frozenset((pair["a"], pair["b"])): pair for pair in comparison["pairs"]}
    for name in sampling:
        pair = pairs[frozenset((name, "sft"))]
        gain = pair["difference"]["mean"] * (1 if pair["a"] == name else -1)
        assert pair["significant"], name
        assert gain > 0, name
        by_seed = comparison["models"][name]["sampled_accuracy_by_seed"]
        assert min(by_seed) > comparison["models"]["sft"]["sampled_accuracy"]["mean"], name


def test_preference_presets_lift_accuracy_on_held_out_pairs(comparison: Any) -> None:
    _, most = wilson(comparison["models"]["sft"]["preference_accuracy"] * 400, 400, 0.95)
    for name in ("dpo", "dpo_soft", "grpo_pairs"):
        assert comparison["models"][name]["preference_accuracy"] > most, name


def test_the_report_says_whether_dapo_kept_its_entropy(comparison: Any) -> None:
    dapo, grpo = (comparison["models"][name]["entropy"] for name in ("dapo", "grpo"))
    (said,) = [sentence for sentence in comparison["findings"] if "entropy" in sentence]
    assert f"{dapo['mean']:.3f} against {grpo['mean']:.3f} nats" in said
    assert said.startswith("dapo ends with more entropy") == (dapo["low"] > grpo["high"])

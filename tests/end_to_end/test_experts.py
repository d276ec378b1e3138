"""A mixture-of-experts model through the whole pipeline, under an algorithm of every kind."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable

import pytest

from tests.end_to_end.conftest import TINY, Clone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ALGORITHMS = ("dpo", "grpo_pairs", "ppo", "gspo", "chord")


def test_every_kind_of_algorithm_trains_a_mixture_of_experts(new_clone: Callable[[], Clone]) -> None:
    clone = new_clone()
    clone.configure(str(TINY))
    clone.configure(
        "model.tiny.experts=4",
        f"project.algorithms=[{', '.join(ALGORITHMS)}]",
        "algorithms.gspo.rewards.rm=1.0",
    )
    clone.repro(POSTTRAIN_FOLLOWER="1")
    assert json.loads((clone.root / "models/base/config.json").read_text())["num_local_experts"] == 4
    for name in ("sft", *(f"align/{algorithm}-0" for algorithm in ALGORITHMS)):
        with (clone.root / "runs" / name / "curves.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        # four experts, two a token
        assert all(1.0 <= float(row["router/load_max"]) <= 2.0 for row in rows), name
        assert all(float(row["router/entropy"]) > 0 for row in rows), name
        # PPO and GSPO take several updates a step; in the others there is no older policy to compare with
        changed = [float(row["router/changed"]) for row in rows if row.get("router/changed")]
        assert bool(changed) == (name in ("align/ppo-0", "align/gspo-0")), name
        assert all(0 <= value < 1 for value in changed)
        assert not changed or max(changed) > 0

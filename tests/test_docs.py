"""The documents name tests, files and metrics that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.algorithms import PRESETS
from posttrain.algorithms.specs import OnPolicy, Unpaired
from posttrain.data.batches import EpochOrder
from posttrain.settings import OptimizerSettings
from posttrain.training.trainer import Trainer
from posttrain.training.unpaired import UnpairedSource
from tests.models import small
from tests.training.cases import NAMES, case, with_record
from tests.training.runs import options_of, source_of

TEST = re.compile(r"tests/[\w/]+\.py(?:::\w+)?")
NAME = re.compile(r"`([^`]+)`")
ELSEWHERE = (
    "heldout/", "pairs/", "faults/", "router/", "benchmark/", "second_task/", "selection/", "reward/varied/questions",
    "reward/varied/prompt_tokens", "reward/varied/completion_tokens", "reward/varied/order_changed",
    "reward/varied/disagreement", "reward/varied/cut", "staleness/", "pass@",
)  # fmt: skip
"""Logged by the reward step, the loop at a fault, mixtures of experts, benchmarks, a second task, pass@k, a choice of the step, judges,
ensembles, and sampling ahead."""


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def test_every_test_that_a_document_names_exists(root: Path) -> None:
    named = {name for path in documents(root) for name in TEST.findall(path.read_text(encoding="utf-8"))}
    missing = []
    for name in sorted(named):
        file, _, test = name.partition("::")
        there = (root / file).is_file()
        if not there or (test and f"def {test}(" not in (root / file).read_text(encoding="utf-8")):
            missing.append(name)
    assert missing == []
    assert len(named) > 50


def documented(root: Path) -> set[str]:
    """Return the names in the first column of docs/metrics.md; `/std` after `reward/x/mean` is `reward/x/std`."""
    names: list[str] = []
    for line in (root / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        for name in NAME.findall(line.split("|")[1]) if line.startswith("| `") else ():
            names.append(names[-1].rpartition("/")[0] + name if name.startswith("/") else name)
    return {name.replace("<source>", "varied") for name in names}


@pytest.fixture(scope="module")
def logged() -> dict[str, set[str]]:
    """Names of the metrics of one step, by objective."""
    found: dict[str, set[str]] = {}
    for name in NAMES:
        made = case(name)
        model = made.model()
        trainer = trainer_of(model)
        found[name] = set(trainer.update(made.rows, made.objective))
        record = PRESETS.get(name)
        if isinstance(record, OnPolicy):
            policy = small.policy(critic=record.has_critic)
            found[name] |= set(source_of(options_of(name), policy)[0].next(0).metrics)
            if record.has_critic:
                found[name].add("value/grad_norm")
        elif isinstance(record, Unpaired):
            order = EpochOrder(len(made.rows), 4, 1, 0)
            found[name] |= set(UnpairedSource(made.rows, order, model, trainer.accelerator, 400).next(0).metrics)
    masking = with_record(case("grpo"), mismatch="mask")
    found["mismatch"] = set(trainer_of(masking.model()).update(masking.rows, masking.objective))
    return found


def trainer_of(model: Any) -> Trainer[Any]:
    return Trainer(model, OptimizerSettings(1e-3), total_steps=9, micro_batch_tokens=400)


def test_every_metric_has_its_line_in_the_table_and_every_line_its_metric(
    root: Path, logged: dict[str, set[str]]
) -> None:
    every = set().union(*logged.values())
    assert sorted(every - documented(root)) == []
    assert [n for n in sorted(documented(root) - every) if not n.startswith(ELSEWHERE)] == []


EVERY_ON_POLICY = {
    "reward/varied/mean", "reward/total/std", "reward/total/missing", "advantage/std", "groups/zero_variance", "entropy",
    "clip/low", "clip/high", "kl/approx", "kl/ref_k1", "kl/ref_k3", "ratio/min", "ratio/mean", "ratio/max", "mismatch/mean",
    "length/mean", "length/truncated", "grad_norm", "learning_rate", "sampling/acceptance", "tokens/sampled", "tokens/trained",
}  # fmt: skip
EXPERT, CRITIC = (
    {"expert/mu", "expert/phi", "expert/loss"},
    {"value/loss", "value/explained_variance", "value/grad_norm"},
)


def test_every_on_policy_preset_logs_the_same_names(logged: dict[str, set[str]]) -> None:
    for name, record in PRESETS.items():
        if isinstance(record, OnPolicy):
            own = EVERY_ON_POLICY | (EXPERT if record.has_expert else set()) | (CRITIC if record.has_critic else set())
            assert sorted(own - logged[name]) == [], name

"""Which inputs count for a model, by the parameters of its run; and records are read as the loader of params.yaml reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config.params import load_params
from pipelines.config.yaml_files import parse_written, read_yaml
from pipelines.lineage.reads import trained_on
from pipelines.lineage.records import Artifact, StageRecord
from pipelines.tracking.lockfile import read_lock
from posttrain.errors import TrackingError

TABLES = ("sft", "preferences", "problems", "labelled")
DECLARED = tuple(Artifact(f"data/valid/{t}.parquet", t) for t in TABLES) + tuple(
    Artifact(f"models/{m}", m) for m in ("base", "sft", "reward")
)


def used(root: Path, name: str, **section: Any) -> set[str]:
    """Return the hashes of the inputs that count for an algorithm of the shipped parameters with a changed section."""
    tree = read_yaml(root / "params.yaml")
    own = tree["algorithms"].get(name, {"preset": name}) | section
    params = {f"algorithms.{name}": own, "align": tree["align"], "rewards": tree["rewards"]}
    record = StageRecord(f"python -m pipelines.align --algorithm {name} --seed 0", DECLARED, (), params)
    return {each.md5 for each in trained_on(record)}


def test_every_algorithm_counts_with_what_it_learns_from(root: Path) -> None:
    assert used(root, "dpo") == used(root, "grpo_pairs") == {"preferences", "sft"}
    assert used(root, "kto") == {"preferences", "labelled", "sft"}
    assert used(root, "grpo", rewards={"answer": 1.0, "rm": 0.0}) == {"problems", "sft"}
    assert used(root, "grpo", rewards={"answer": 1.0, "rm": 0.5}) == {"problems", "sft", "reward"}
    assert used(root, "grpo", rewards={"answer": 1.0}, start="base") == {"problems", "base"}
    stopping = {"on_divergence": "stop"}
    assert used(root, "grpo", rewards={"answer": 1.0, "rm": 0.0}, budget=stopping) == {"problems", "sft", "reward"}
    assert used(root, "ppo", rewards={"answer": 1.0}) == {"problems", "sft", "reward"}, "the critic starts from it"
    sft_critic = {"options": {"critic_start": "sft"}}
    assert used(root, "ppo", rewards={"answer": 1.0}, **sft_critic) == {"problems", "sft"}


def test_held_out_pairs_only_measure_a_reward_model() -> None:
    inputs = [Artifact(f"data/valid/{table}.parquet", table) for table in ("preferences", "preferences_heldout")]
    record = StageRecord("python -m pipelines.reward", (*inputs, Artifact("models/sft", "sft")), (), {})
    assert [each.md5 for each in trained_on(record)] == ["preferences", "sft"]


def test_demonstrations_count_for_chord_only(root: Path) -> None:
    def tables(name: str) -> set[str]:
        tree = read_yaml(root / "params.yaml")
        params = {f"algorithms.{name}": {"preset": name}, "align": tree["align"], "rewards": tree["rewards"]}
        record = StageRecord(f"python -m pipelines.align --algorithm {name} --seed 0", DECLARED, (), params)
        return {each.path for each in trained_on(record) if each.path.startswith("data/")}

    assert tables("chord") == {"data/valid/problems.parquet", "data/valid/sft.parquet"}
    assert tables("gspo") == {"data/valid/problems.parquet"}


@pytest.mark.parametrize("params", [{}, {"algorithms.x": {"preset": "unknown"}, "align": {}, "rewards": {}}])
def test_an_unknown_algorithm_counts_with_everything(params: dict[str, Any]) -> None:
    record = StageRecord("python -m pipelines.align --algorithm x --seed 0", DECLARED, (), params)
    assert trained_on(record) == DECLARED


def test_a_lock_with_a_stage_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    """As both sides of a merge that was resolved by hand leave it."""
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages:\n  sft:\n    cmd: a\n  sft:\n    cmd: b\n")
    reason = 'dvc.lock: found duplicate key "sft" .*line 5; remove one of the two. It is damaged'
    with pytest.raises(TrackingError, match=reason):
        read_lock(tmp_path)


def test_records_are_read_as_params_are(root: Path, tmp_path: Path) -> None:
    text = "a: 2e-5\nb: 1e-05\nc: no\ne: 1:30\nf: ~\ng: true\nh: 1_000\ni: .5\nj: 0x1F\n"
    path = tmp_path / "record.yaml"
    for content in (text, (root / "params.yaml").read_text(encoding="utf-8")):
        path.write_text(content, encoding="utf-8")
        assert parse_written(content) == read_yaml(path)
    assert load_params(root / "params.yaml").sft.optimizer.learning_rate == 2e-3

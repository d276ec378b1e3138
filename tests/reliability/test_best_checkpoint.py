"""The align step with `align.best_checkpoint`: the model that it writes is that of the step with the best score."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from pipelines.config.checkpoint_schema import BestCheckpointParams
from pipelines.data.tables import read_rows
from pipelines.runtime.journal import read
from pipelines.training.best_checkpoint import split_problems
from posttrain.errors import DataError
from tests.reliability.workspace import Workspace

GRPO = ("pipelines.align", "--algorithm", "grpo", "--seed", "0")
RULE = "align.best_checkpoint={every_steps: 1, problems: 6, reward: short}"
SHORT = "rewards.short={function: length, arguments: {target: 3, tolerance: 40}}"


@pytest.fixture
def own(workspace: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the workspace before alignment."""
    folder = tmp_path / "project"
    for name in ("params.yaml", "dvc.yaml", "data", "models", "runs/reward_readers"):
        source = workspace.folder / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return Workspace(folder, workspace.warm)


def journal(folder: Path, name: str) -> tuple[dict[int, float], dict[str, float]]:
    """Return the scores by step, and the summary."""
    scores, summary = dict[int, float](), dict[str, float]()
    for record in read(folder / "runs" / "align" / name / "journal.jsonl"):
        if record["kind"] == "metrics" and "selection/short" in record["values"]:
            scores[record["step"]] = record["values"]["selection/short"]
        summary |= record["values"] if record["kind"] == "summary" else {}
    return scores, summary


def weights(folder: Path, name: str) -> dict[str, Any]:
    return load_file(folder / "models" / "align" / name / "model.safetensors")


def test_the_written_model_is_the_one_of_the_chosen_step(own: Workspace) -> None:
    budget = (
        "algorithms.grpo.budget={{steps: {}, optimizer: {{learning_rate: 2e-2, schedule: constant, warmup_steps: 0}}}}"
    )
    own.succeed("pipelines.commands.configure", budget.format(4), SHORT, RULE)
    said = own.succeed(*GRPO)
    scores, summary = journal(own.folder, "grpo-0")
    assert sorted(scores) == [1, 2, 3, 4]
    best = max(scores, key=lambda step: (scores[step], -step))
    assert (summary["selection/step"], summary["selection/measured"]) == (best, 4)
    assert summary["selection/score"] == scores[best]
    assert f"step {best} is kept, the best of 4 measured steps: short {scores[best]:.4f} on 6 problems" in said
    chosen = weights(own.folder, "grpo-0")

    # a run that ends at the chosen step, over the same training problems, gives the same weights
    rule = BestCheckpointParams(every_steps=1, problems=6, reward="short")
    table = own.folder / "data" / "valid" / "problems.parquet"
    kept = {row["id"] for row in split_problems(read_rows(table), rule)[0]}
    whole = pq.read_table(table)
    pq.write_table(whole.filter([row["id"] in kept for row in whole.to_pylist()]), table)
    own.succeed("pipelines.commands.configure", budget.format(best), "align.best_checkpoint=null")
    own.succeed(*GRPO)
    last = weights(own.folder, "grpo-0")
    assert chosen.keys() == last.keys()
    assert all(bool((chosen[name] == last[name]).all()) for name in last)


@pytest.mark.slow
def test_pairs_are_chosen_on_the_same_problems(own: Workspace) -> None:
    own.succeed("pipelines.commands.configure", SHORT, RULE)
    own.succeed("pipelines.align", "--algorithm", "dpo", "--seed", "0")
    scores, summary = journal(own.folder, "dpo-0")
    assert len(scores) == summary["steps"] == summary["selection/measured"]
    assert summary["selection/score"] == max(scores.values())
    assert "the best of" in (own.folder / "models/align/dpo-0/README.md").read_text(encoding="utf-8")


def test_a_prompt_that_chooses_is_trained_on_in_none_of_its_rows() -> None:
    rows = [{"id": i, "prompt": f"{i % 5} + 1 =", "answer": str(i % 5 + 1)} for i in range(20)]
    trained, chosen = split_problems(rows, BestCheckpointParams(every_steps=1, problems=2))
    assert len(chosen) == 2
    assert len(trained) == 12
    assert not {row["prompt"] for row in chosen} & {row["prompt"] for row in trained}
    assert split_problems(rows, None) == (rows, [])
    chat = [{"id": 0, "prompt": [{"role": "user", "content": "1"}]}, {"id": 1, "prompt": "1"}]
    assert [len(part) for part in split_problems(chat, BestCheckpointParams(every_steps=1, problems=1))] == [1, 1]
    with pytest.raises(DataError, match=r"problems = 5: data/valid/problems.parquet has 5 different prompts"):
        split_problems(rows, BestCheckpointParams(every_steps=1, problems=5))

"""NaN and infinity in real steps: one row whose weight overflows, one reward that overflows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipelines.data.tables import read_rows, write_rows
from pipelines.runtime.journal import ended, read
from tests.reliability.workspace import Workspace

SFT = ("pipelines.sft",)


@pytest.fixture
def poisoned(workspace: Workspace, tmp_path: Path) -> Workspace:
    """Row 7 of the sft table has a weight that float32 cannot hold; every other row has weight 1."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(workspace.folder / name, tmp_path)
    shutil.copytree(workspace.folder / "data", tmp_path / "data")
    shutil.copytree(workspace.folder / "models" / "base", tmp_path / "models" / "base")
    table = tmp_path / "data" / "valid" / "sft.parquet"
    rows = [row | {"weight": 1.0} for row in read_rows(table)]
    assert rows[7]["id"] == 7
    rows[7]["weight"] = 1e39
    write_rows("sft", rows, table)
    return Workspace(tmp_path, workspace.warm)


def test_the_default_is_to_stop_and_to_say_which_row(poisoned: Workspace) -> None:
    done = poisoned.run(*SFT)
    assert done.returncode == 3
    state = poisoned.state("sft")
    (kept,) = (state / "faults").iterdir()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: step ")
    assert "the loss of update" in last
    assert last.endswith(
        "no update may be skipped (faults.skip_at_most = 0). State saved. Replay with:"
        f" `python -m pipelines.sft --replay {kept}`"
    )
    assert ended(read(state / "journal.jsonl")) == "FAILED"
    (table,) = (state / "artifacts").glob("faults-*.json")
    (fault,) = json.loads(table.read_text())
    assert "7" in fault["rows"]
    assert len(fault["rows"]) == 16
    assert not (poisoned.folder / "models" / "sft").exists()

    before = sorted(state.rglob("*"))
    again = poisoned.run(*SFT, "--replay", str(kept))
    assert again.returncode == 3
    assert "weights that are not finite: none" in again.stdout
    broken = [line.split(":")[0].strip() for line in again.stdout.splitlines() if "loss inf" in line]
    assert broken == ["row 7"]
    assert sorted(state.rglob("*")) == before


def test_as_many_as_allowed_are_left_out_also_across_a_kill(poisoned: Workspace) -> None:
    poisoned.succeed("pipelines.commands.configure", "sft.faults.skip_at_most=1")
    assert poisoned.run(*SFT).returncode == 3, "the row comes once an epoch, so twice"
    poisoned.succeed("pipelines.commands.configure", "sft.faults.skip_at_most=2")
    said = poisoned.succeed(*SFT)
    assert "skipped, 2 of at most 2" in said
    undisturbed = poisoned.results("models/sft", "runs/sft")
    tables = [path for path in undisturbed if "artifacts/faults-" in path]
    assert len(tables) == 2
    shutil.rmtree(poisoned.folder / ".posttrain")
    shutil.rmtree(poisoned.folder / "models" / "sft")
    poisoned.killed_at("metrics 7", *SFT)
    poisoned.succeed(*SFT)
    assert poisoned.results("models/sft", "runs/sft") == undisturbed


def test_an_infinite_reward_is_told_with_its_problems(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "grpo"
    shutil.copytree(workspace.folder, folder, ignore=shutil.ignore_patterns(".posttrain", "align"))
    grpo = Workspace(folder, workspace.warm)
    step = ("pipelines.align", "--algorithm", "grpo", "--seed", "0")
    grpo.succeed("pipelines.commands.configure", "rewards.varied.function=tests.reliability.judge:overflowing")
    done = grpo.run(*step)
    assert done.returncode == 3, done.stdout + done.stderr
    (kept,) = (grpo.state("align-grpo-0") / "faults").iterdir()
    assert "preparing its batches: reward 'varied' returned inf" in done.stderr
    assert "(rows problem " in done.stderr
    again = grpo.run(*step, "--replay", str(kept))
    assert again.returncode == 3
    assert "reward 'varied' returned inf" in again.stderr
    # the reward is mended, which is no change of the parameters
    again = grpo.run(*step, "--replay", str(kept), MENDED="1")
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "the fault is gone: 2 batches were made")

"""Runs that keep their rollouts, and `posttrain replay`, which computes their updates again."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.runtime.journal import read
from tests.reliability.workspace import Workspace

ALGORITHMS = ("grpo", "ppo", "dapo", "gspo", "chord")
REPLAY = "pipelines.commands.replay"
KEEP_ALL = "align.on_policy.rollouts.keep=all"


def align(algorithm: str) -> tuple[str, ...]:
    return ("pipelines.align", "--algorithm", algorithm, "--seed", "0")


@pytest.fixture(scope="module")
def kept(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A copy of the workspace in which runs keep all rollouts."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(workspace.folder, folder, ignore=shutil.ignore_patterns(".posttrain", "align"), dirs_exist_ok=True)
    copied = Workspace(folder, workspace.warm)
    copied.succeed("pipelines.commands.configure", KEEP_ALL)
    return copied


def changed(path: Path, column: str) -> None:
    """Add a half to a column of the first answer of a table."""
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[0] = [value + 0.5 for value in values[0]]
    place = table.schema.get_field_index(column)
    other = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    pq.write_table(other.replace_schema_metadata(table.schema.metadata), path)


def test_a_replay_gives_the_numbers_of_the_run_and_names_the_first_that_differs(kept: Workspace) -> None:
    kept.succeed(*align("grpo"))
    run = kept.folder / "runs" / "align" / "grpo-0"
    said = kept.succeed(REPLAY, "grpo-0")
    last = next(r["values"] for r in read(run / "journal.jsonl") if r["kind"] == "metrics" and r["step"] == 6)
    assert f"steps 1 to 6 give the same numbers to the last bit. Step 6, loss {last['loss']!r}" in said
    changed(run / "artifacts" / "rollouts-000003.parquet", "advantages")
    assert "steps 1 to 2 give the same numbers" in kept.succeed(REPLAY, "grpo-0", "--step", "2")
    done = kept.run(REPLAY, "grpo-0")
    assert done.returncode == 1
    assert done.stdout.startswith("first difference: step 3, ")
    (run / "artifacts" / "rollouts-000002.parquet").write_bytes(b"PAR1")
    done = kept.run(REPLAY, "grpo-0")
    assert done.returncode == 2
    assert "rollouts-000002.parquet: not a table of rollouts" in done.stderr


def test_a_killed_run_keeps_the_same_tables_and_params_yaml_may_change_later(kept: Workspace) -> None:
    kept.succeed(*align("rloo"))
    outputs = ("runs/align/rloo-0", "models/align/rloo-0")
    undisturbed = kept.results(*outputs)
    assert sum("rollouts-" in path for path in undisturbed) == 6
    kept.forget("align-rloo-0", *outputs)
    kept.killed_at("metrics 4", *align("rloo"))
    kept.succeed(*align("rloo"))
    assert kept.results(*outputs) == undisturbed
    kept.succeed("pipelines.commands.configure", "align.on_policy.optimizer.learning_rate=0.5")
    assert "steps 1 to 6 give the same numbers" in kept.succeed(REPLAY, "rloo-0")
    kept.succeed("pipelines.commands.configure", "align.on_policy.optimizer.learning_rate=2e-4")


def test_a_share_and_the_extremes_are_for_reading_only(kept: Workspace) -> None:
    for keep, most in (("0.25", 15), ("extremes", 12)):
        kept.succeed("pipelines.commands.configure", f"align.on_policy.rollouts.keep={keep}")
        kept.succeed(*align("cispo"))
        tables = sorted((kept.folder / "runs/align/cispo-0/artifacts").glob("rollouts-*.parquet"))
        counts = [pq.read_metadata(path).num_rows for path in tables]
        assert len(counts) == 6
        assert all(0 < count <= most for count in counts)
        done = kept.run(REPLAY, "cispo-0")
        assert done.returncode == 2
        assert "a replay needs all answers" in done.stderr
    kept.succeed("pipelines.commands.configure", KEEP_ALL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gpo-0",), "no run 'gpo-0'; did you mean 'grpo-0'?"),
        (("runs/sft",), "runs/sft: a run of the stage sft"),
        (("grpo-0", "--step", "7"), "--step 7: runs/align/grpo-0 has the steps 1 to 6"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_words(kept: Workspace, arguments: tuple[str, ...], words: str) -> None:
    if not (kept.folder / "runs/align/grpo-0").exists():
        kept.succeed(*align("grpo"))
    done = kept.run(REPLAY, *arguments)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr


@pytest.mark.slow
def test_twenty_random_steps_of_five_algorithms_are_equal_to_the_last_bit(kept: Workspace) -> None:
    drawn = random.Random(0)
    for algorithm in ALGORITHMS:
        kept.succeed(*align(algorithm))
    for algorithm, step in [(algorithm, drawn.randint(1, 6)) for algorithm in ALGORITHMS * 4]:
        said = kept.succeed(REPLAY, f"{algorithm}-0", "--step", str(step))
        records = read(kept.folder / "runs" / "align" / f"{algorithm}-0" / "journal.jsonl")
        values = next(r["values"] for r in records if r["kind"] == "metrics" and r["step"] == step)
        shown = f"Step {step}, loss {values['loss']!r}, grad_norm {values['grad_norm']!r}."
        assert f"steps 1 to {step} give the same numbers to the last bit. {shown}" in said, json.dumps(values)

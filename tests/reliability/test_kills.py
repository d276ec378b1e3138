"""SIGKILL at random points of every kind of training: the result and every recorded number are those of the undisturbed run."""

from __future__ import annotations

import random

import pytest

from pipelines.runtime.journal import ended, read
from tests.reliability.workspace import Workspace

STEPS = {
    "sft": ("sft", ("pipelines.sft",)),
    "reward": ("reward", ("pipelines.reward",)),
} | {
    name: (f"align-{name}-0", ("pipelines.align", "--algorithm", name, "--seed", "0"))
    for name in ("dpo", "ppo", "grpo", "dapo", "chord")
}


def outputs(name: str) -> tuple[str, ...]:
    return (f"models/{name}", f"runs/{name}") if name in ("sft", "reward") else (
        f"models/align/{name}-0", f"runs/align/{name}-0",
    )  # fmt: skip


def choose(points: list[str], seed: str) -> list[str]:
    """Three points in the order in which a run passes them; the first lies in the writing of a checkpoint."""
    chance = random.Random(seed)
    once = [point for point in points if points.count(point) == 1]
    trained = once[
        once.index("metrics 1") : once.index("end")
    ]  # with the end record on disk there is nothing to resume
    writing = [i for i, point in enumerate(trained) if "/partial-" in point or "/step-" in point]
    first = chance.choice(writing[:-1])
    return [trained[i] for i in (first, *sorted(chance.sample(range(first + 1, len(trained)), 2)))]


def begin(name: str, workspace: Workspace) -> tuple[list[str], dict[str, str]]:
    """Return every point of an undisturbed run and its outputs, then remove the run."""
    run, step = STEPS[name]
    if (workspace.folder / outputs(name)[0]).exists():
        workspace.forget(run, *outputs(name))
    points = workspace.points(*step)
    undisturbed = workspace.results(*outputs(name))
    assert any(path.endswith("model.safetensors") for path in undisturbed)
    workspace.forget(run, *outputs(name))
    return points, undisturbed


@pytest.mark.parametrize("name", STEPS)
def test_three_kills_change_nothing(name: str, workspace: Workspace) -> None:
    run, step = STEPS[name]
    points, undisturbed = begin(name, workspace)
    for point in choose(points, name):
        workspace.killed_at(point, *step)
        assert ended(read(workspace.state(run) / "journal.jsonl")) is None
    said = workspace.succeed(*step)
    assert f"{run}: continuing run {workspace.state(run).name}" in said
    assert "resuming from the checkpoint after step" in said
    assert workspace.results(*outputs(name)) == undisturbed
    assert any(record["kind"] == "resume" for record in read(workspace.state(run) / "journal.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_run_that_is_killed_at_every_point_still_arrives(name: str, workspace: Workspace) -> None:
    points, undisturbed = begin(name, workspace)
    for point in dict.fromkeys(points[: points.index("end")]):
        # what one process begins a later one need not begin again: an old checkpoint is removed once
        workspace.run("tests.reliability.dying", point, *STEPS[name][1])
    workspace.succeed(*STEPS[name][1])
    assert workspace.results(*outputs(name)) == undisturbed


def test_other_code_does_not_continue_a_checkpoint(workspace: Workspace) -> None:
    """`dvc repro` runs a stage again after an edit; results of the old code must not be half of the new result."""
    run, step = STEPS["sft"]
    _, undisturbed = begin("sft", workspace)
    workspace.killed_at("metrics 5", *step)
    graph = workspace.folder / "dvc.yaml"
    declared = graph.read_text()
    graph.write_text(declared.replace("- pipelines/sft.py", "- pipelines/sft.py\n      - pipelines/align.py"))
    said = workspace.succeed(*step)
    graph.write_text(declared)
    assert f"{run}: the code has changed since the checkpoints were written, so they are removed" in said
    assert "resuming from the checkpoint" not in said
    assert workspace.results(*outputs("sft")) == undisturbed

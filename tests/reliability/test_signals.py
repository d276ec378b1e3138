"""TERM and Ctrl-C in a real training: the step in hand is finished, a checkpoint written, and a second signal stops at once."""

from __future__ import annotations

import signal

import pytest

from pipelines.runtime.journal import ended, read
from tests.reliability.test_kills import STEPS, begin, outputs
from tests.reliability.workspace import Workspace


@pytest.mark.parametrize(("number", "name"), [("SIGTERM", "sft"), ("SIGINT", "grpo"), ("SIGHUP", "sft")])
def test_a_signal_finishes_the_step_in_hand_and_writes_a_checkpoint(
    number: str, name: str, workspace: Workspace
) -> None:
    if number == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        pytest.skip("these tests run under nohup, so that their steps ignore SIGHUP as well")
    run, step = STEPS[name]
    _, undisturbed = begin(name, workspace)
    done = workspace.run("tests.reliability.dying", "metrics 3", *step, SIGNAL=number)
    assert done.returncode == 143
    assert f"error: {run} was stopped by a signal after step 3; run it again to resume from there" in done.stderr
    journal = read(workspace.state(run) / "journal.jsonl")
    assert ended(journal) == "KILLED"
    assert [record["step"] for record in journal if record["kind"] == "metrics"] == [1, 2, 3]
    assert "step-00000003" in {path.name for path in workspace.state(run).rglob("step-*")}
    assert "resuming from the checkpoint after step 3" in workspace.succeed(*step)
    assert workspace.results(*outputs(name)) == undisturbed


def test_a_second_signal_stops_at_once_even_while_the_checkpoint_is_written(workspace: Workspace) -> None:
    run, step = STEPS["sft"]
    points, undisturbed = begin("sft", workspace)
    (folder,) = {point.split("/partial-")[0] for point in points if "/partial-" in point and point.startswith("mkdir")}
    second = f"{folder}/partial-00000003/manifest.json".replace("mkdir", "open")
    done = workspace.run("tests.reliability.dying", f"metrics 3,{second}", *step, SIGNAL="SIGTERM")
    assert done.returncode == 143
    assert "error: stopped by SIGTERM" in done.stderr
    assert ended(read(workspace.state(run) / "journal.jsonl")) == "KILLED"
    assert "step-00000003" not in {path.name for path in workspace.state(run).rglob("step-*")}
    assert "resuming from the checkpoint after step 2" in workspace.succeed(*step)
    assert workspace.results(*outputs("sft")) == undisturbed

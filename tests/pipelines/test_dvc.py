"""A step under a dvc that is killed: nothing stays behind, and the next `dvc repro` goes on by itself and reports it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.identity import content_digest
from pipelines.runtime.journal import read
from tests.pipelines.conftest import Project, wait_for
from tests.pipelines.runtime.test_consistency import epochs

GRAPH = """
stages:
  count:
    cmd: {python} -m count
    deps: [steps.txt]
    params: [sft, algorithms.grpo]
    outs: [runs/count/grpo-0/journal.jsonl, runs/count/grpo-0/artifacts]
"""


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_dvc_repro_after_a_kill_of_dvc_resumes_and_says_so(project: Project, shell: str) -> None:
    """Bash becomes the step's process; dash stays between dvc and the step, and lives on."""
    if not Path(shell).exists():
        pytest.skip(f"no {shell} here")
    (project.folder / "steps.txt").write_text("100")  # twenty seconds: the kill comes before the end on any machine
    assert project.run().returncode == 0
    undisturbed = content_digest(project.directory / "journal.jsonl")
    for folder in (project.directory, project.state):
        subprocess.run(["rm", "-r", str(folder)], check=True)
    (project.folder / "dvc.yaml").write_text(GRAPH.format(python=sys.executable))
    assert project.run("init", "-q", "--no-scm", module="dvc").returncode == 0

    dvc = project.start("repro", module="dvc", SHELL=shell, STEP_SECONDS="0.2")
    journals = project.folder.glob
    wait_for(
        lambda: any(r.get("step", 0) >= 6 for path in journals(".posttrain/runs/*/journal.jsonl") for r in read(path))
    )
    family = psutil.Process(dvc.pid).children(recursive=True)
    assert family
    os.kill(dvc.pid, signal.SIGKILL)
    dvc.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert not (project.directory / "journal.jsonl").exists()

    again = project.run("repro", module="dvc")
    assert again.returncode == 0, again.stderr
    assert f"continuing run {project.state.name}, journal holds steps up to" in again.stdout + again.stderr
    assert content_digest(project.directory / "journal.jsonl") == undisturbed


def test_dvc_records_nothing_if_parameters_change_while_a_stage_runs(project: Project) -> None:
    """Otherwise dvc.lock would say 7 epochs, the journal 6, and `dvc status` nothing."""
    (project.folder / "dvc.yaml").write_text(GRAPH.format(python=sys.executable))
    assert project.run("init", "-q", "--no-scm", module="dvc").returncode == 0
    dvc = project.start("repro", module="dvc", STEP_SECONDS="0.2")
    wait_for(lambda: any(len(read(path)) > 3 for path in project.folder.glob(".posttrain/runs/*/journal.jsonl")))
    epochs(project)
    out, err = dvc.communicate(timeout=60)
    assert dvc.returncode != 0
    assert "error: count: sft.epochs changed from 6 to 7 in params.yaml while the stage ran" in out + err
    assert not (project.folder / "dvc.lock").exists()

    assert project.run("repro", module="dvc").returncode == 0
    locked = read_yaml(project.folder / "dvc.lock")["stages"]["count"]["params"]["params.yaml"]["sft"]["epochs"]
    (recorded,) = (
        r["values"]["sft.epochs"] for r in read(project.directory / "journal.jsonl") if r["kind"] == "params"
    )
    assert (locked, recorded) == (7, 7)

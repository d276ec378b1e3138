"""Two parents on one project at the same time: one works, the other one is refused in words, and nothing is lost or done twice."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from pipelines.runtime.identity import content_digest
from pipelines.runtime.journal import read
from tests.pipelines.conftest import Project, wait_for
from tests.pipelines.test_dvc import GRAPH


@pytest.fixture
def under_dvc(project: Project) -> Project:
    (project.folder / "dvc.yaml").write_text(GRAPH.format(python=sys.executable))
    assert project.run("init", "-q", "--no-scm", module="dvc").returncode == 0
    return project


def at_work(project: Project) -> bool:
    journals = project.folder.glob(".posttrain/runs/*/journal.jsonl")
    return any(record.get("step", 0) >= 2 for path in journals for record in read(path))


def test_the_second_of_two_dvc_repro_is_refused_and_the_first_one_is_not_disturbed(under_dvc: Project) -> None:
    first = under_dvc.start("repro", module="dvc", STEP_SECONDS="1.0")
    wait_for(lambda: at_work(under_dvc))
    second = under_dvc.run("repro", module="dvc", STEP_SECONDS="1.0")
    assert first.poll() is None, "the first one was to be at work all the time"
    assert second.returncode not in (0, None)
    assert f"(PID {first.pid})" in second.stderr
    assert "busy" in second.stderr
    assert "Traceback" not in second.stderr
    by_hand = under_dvc.run(STEP_SECONDS="1.0")
    assert by_hand.returncode == 2
    assert "is already running" in by_hand.stderr
    first.communicate(timeout=180)
    assert first.returncode == 0
    steps = [record["step"] for record in read(under_dvc.directory / "journal.jsonl") if record["kind"] == "metrics"]
    assert steps == list(range(12))
    found = content_digest(under_dvc.directory / "journal.jsonl")
    again = under_dvc.run("repro", module="dvc")
    assert (again.returncode, "up to date" in again.stdout) == (0, True)

    shutil.rmtree(under_dvc.directory)
    shutil.rmtree(under_dvc.folder / ".posttrain")
    assert under_dvc.run("repro", "--force", "--no-run-cache", module="dvc").returncode == 0
    assert content_digest(under_dvc.directory / "journal.jsonl") == found


@pytest.mark.slow
@pytest.mark.parametrize("stagger", [0.0, 0.3, 0.8])
def test_two_dvc_repro_that_start_together_leave_one_whole_result(under_dvc: Project, stagger: float) -> None:
    """Whichever comes first: no half of dvc.lock, no output of two runs, and a third `dvc repro` has nothing to do."""
    import time

    pair = [under_dvc.start("repro", module="dvc", STEP_SECONDS="0.1")]
    time.sleep(stagger)
    pair.append(under_dvc.start("repro", module="dvc", STEP_SECONDS="0.1"))
    answers = [(*process.communicate(timeout=180), process.returncode) for process in pair]
    assert 0 in [status for *_, status in answers]
    assert not any("Traceback" in out + err for out, err, _ in answers)
    again = under_dvc.run("repro", module="dvc")
    assert (again.returncode, "up to date" in again.stdout) == (0, True), again.stdout + again.stderr
    steps = [record["step"] for record in read(under_dvc.directory / "journal.jsonl") if record["kind"] == "metrics"]
    assert steps == list(range(12))
    assert not Path(under_dvc.folder, ".dvc", "tmp", "rwlock").read_text().strip("{}\n ")

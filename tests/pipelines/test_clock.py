"""The wall clock jumps by days while a step, or dvc, is at work: the result is that of an undisturbed run."""

from __future__ import annotations

import shutil
import sys

import pytest

from pipelines.runtime.identity import content_digest
from pipelines.runtime.journal import read
from tests.clock import DAY, NEEDED, Clock
from tests.pipelines.conftest import Project, wait_for
from tests.pipelines.test_dvc import GRAPH

JUMPS = (3 * DAY, -40 * DAY, 3600, -5, 0)
pytestmark = [pytest.mark.slow, NEEDED]


def steps(project: Project) -> int:
    journals = project.folder.glob(".posttrain/runs/*/journal.jsonl")
    return max((record.get("step", 0) for path in journals for record in read(path)), default=0)


@pytest.mark.parametrize("parent", ["count", "dvc"])
def test_jumps_change_no_byte_of_a_run(parent: str, project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    clock = Clock(tmp_path_factory.mktemp("clock"))
    (project.folder / "dvc.yaml").write_text(GRAPH.format(python=sys.executable))
    assert project.run("init", "-q", "--no-scm", module="dvc").returncode == 0
    assert project.run("repro", module="dvc").returncode == 0
    undisturbed = content_digest(project.directory / "journal.jsonl")
    for folder in (project.directory, project.folder / ".posttrain"):
        shutil.rmtree(folder)
    words = ("repro", "--force", "--no-run-cache") if parent == "dvc" else ()
    run = project.start(*words, module=parent, STEP_SECONDS="0.5", **clock.variables)
    for number, jump in enumerate(JUMPS):
        wait_for(lambda number=number: steps(project) >= 2 * number + 1)
        clock.jump_to(jump)
    out, err = run.communicate(timeout=180)
    assert run.returncode == 0, out + err
    assert "Traceback" not in out + err
    assert content_digest(project.directory / "journal.jsonl") == undisturbed
    assert "up to date" in project.run("repro", module="dvc").stdout

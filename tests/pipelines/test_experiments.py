"""Every command of docs/experiments.md, typed in its order: experiments, a queue, differences, and an older result that comes back."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.journal import read
from tests.pipelines.conftest import Project
from tests.test_readme import commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RATE = "align.on_policy.optimizer.learning_rate"
GRAPH = """
stages:
  count:
    cmd: {python} -m count
    deps: [steps.txt]
    params: [sft, align.on_policy, algorithms.grpo]
    outs: [runs/count/grpo-0/journal.jsonl, runs/count/grpo-0/artifacts]
    metrics: [runs/count/grpo-0/metrics.json]
"""


class Newcomer:
    """Somebody who types the page's commands in a project under git."""

    def __init__(self, project: Project) -> None:
        self.project = project
        (project.folder / "dvc.yaml").write_text(GRAPH.format(python=sys.executable), encoding="utf-8")
        (project.folder / ".gitignore").write_text("/.posttrain/\n/mlflow.db\n/runs/\n__pycache__/\n", encoding="utf-8")
        for command in (["init", "-q"], ["config", "user.name", "test"], ["config", "user.email", "test@localhost"]):
            self.git(*command)
        self.type("dvc init -q")
        self.git("add", "-A")
        self.git("commit", "-qm", "start")

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.project.folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def type(self, line: str) -> str:
        """Run one line of the page and return what it prints."""
        said = ""
        for part in line.split(" && "):
            program, *words = shlex.split(part)
            if program == "git":
                said += self.git(*words)
                continue
            module = "dvc" if program == "dvc" else "pipelines.commands"
            done = self.project.run(*words, module=module)
            assert done.returncode == 0, f"{part}\n{done.stdout}\n{done.stderr}"
            said += done.stdout
        return said

    def rate(self) -> float:
        """Return the learning rate of the present params.yaml."""
        return float(read_yaml(self.project.folder / "params.yaml")["align"]["on_policy"]["optimizer"]["learning_rate"])


def test_the_page_of_experiments_can_be_typed_as_it_is(project: Project, root: Path, tmp_path: Path) -> None:
    page = commands((root / "docs" / "experiments.md").read_text(encoding="utf-8"))
    newcomer, said = Newcomer(project), dict[str, str]()
    newcomer.type(f"dvc remote add -d storage {tmp_path / 'remote'}")
    name, old, commit = "", newcomer.rate(), ""
    for line in page:
        if line.startswith("dvc queue logs"):
            wait_for_queue(newcomer)
            name = re.findall(r"^\w{7}\s+(\S+)", newcomer.type("dvc queue status"), re.MULTILINE)[0]
        if line.startswith("git checkout"):
            commit = newcomer.git("rev-parse", "HEAD")
            newcomer.type("posttrain configure sft.epochs=5")
            newcomer.type("dvc repro")
            newcomer.type("git add params.yaml dvc.lock && git commit -m later")
        if line.startswith("dvc exp apply"):
            name = re.findall(r"\[?(\w+-\w+)\]?", newcomer.type("dvc exp list --name-only"))[0]
        said[line] = newcomer.type(line.replace("NAME", name).replace("COMMIT", commit))
    assert set(said) == set(page)
    assert old != 1e-3
    # the first experiment was applied, committed, and the older commit brings it back
    assert newcomer.rate() == 1e-3
    assert "up to date" in said["dvc repro"]
    journal = project.directory / "journal.jsonl"
    used = next(record["values"] for record in read(journal) if record["kind"] == "params")
    assert used["sft.epochs"] == read_yaml(project.folder / "params.yaml")["sft"]["epochs"] != 5
    assert "lr-1e-3" in newcomer.git("branch", "--list")
    assert said["dvc queue status"].count("Queued") == 4
    assert "Success" in newcomer.type("dvc queue status")


def wait_for_queue(newcomer: Newcomer) -> None:
    """Wait until no experiment is queued or running."""
    deadline = time.monotonic() + 300
    while re.search(r"Queued|Running", newcomer.type("dvc queue status")):
        assert time.monotonic() < deadline, "the queue does not end"
        time.sleep(1)

"""A clone of the project as it is in the working tree, and the whole pipeline run in it once for the session."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.process import child_environment
from tests.compiled import copy_compiled
from tests.reliability.workspace import Warm

CLEARED = ("MLFLOW_TRACKING", "PREFECT_API", "POSTTRAIN_")
TINY = Path("tests/end_to_end/tiny.yaml")


@dataclass(frozen=True)
class Clone:
    """A separate workspace with its own code, DVC cache, MLflow store and journals.

    Its steps are forks of `warm`, which an empty POSTTRAIN_WARM turns off. Its flows share CPU slots and Prefect's database with no
    other one.
    """

    root: Path
    warm: Path | None = None

    def environment(self, **extra: str) -> dict[str, str]:
        inherited = {k: v for k, v in child_environment().items() if not k.startswith(CLEARED)}
        quiet = {"TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        own = {
            "POSTTRAIN_WARM": str(self.warm or ""),
            "POSTTRAIN_LEASES": str(self.root.parent / "leases"),
            "PREFECT_HOME": str(self.root.parent / "prefect"),
        }
        return inherited | {"PYTHONPATH": str(self.root)} | quiet | own | extra

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """A command that nobody listens to."""
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=self.root, env=self.environment(**environment), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        env = self.environment(**environment)
        done = subprocess.run([sys.executable, "-m", *command], cwd=self.root, env=env, capture_output=True, text=True)
        if check and done.returncode != 0:
            raise AssertionError(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        return done

    def configure(self, *changes: str) -> None:
        self.run("pipelines.commands.configure", *changes)

    def repro(self, *targets: str, **environment: str) -> str:
        return self.run("dvc", "repro", *targets, **environment).stdout


@pytest.fixture(scope="session")
def new_clone(
    root: Path, warm: Warm, empty_store: Path, prefect_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Clone]:
    def make() -> Clone:
        target = tmp_path_factory.mktemp("clone") / "project"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.split("\0"):
            if name and (root / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, target / name)  # with its time, so that its compiled form is valid
        copy_compiled(root, target)
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "clone"]):
            identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
            subprocess.run(["git", *identity, *command], cwd=target, check=True)
        shared = root / ".." / "shared"
        if shared.is_dir():
            (target.parent / "shared").symlink_to(shared.resolve())
        shutil.copy(empty_store, target / "mlflow.db")
        (target.parent / "prefect").mkdir()
        shutil.copy(prefect_database, target.parent / "prefect")
        return Clone(target, warm.socket)

    return make


@pytest.fixture(scope="session")
def reproduced(new_clone: Callable[[], Clone]) -> Clone:
    """Return the tiny pipeline after one `dvc repro`; trace.jsonl has the parameters and modules that every step used."""
    clone = new_clone()
    clone.configure(str(TINY))
    (clone.root / ".posttrain").mkdir()
    # one projection at the end instead of a follower for every step: it is quicker
    trace = str(clone.root / ".posttrain" / "trace.jsonl")
    clone.repro(POSTTRAIN_TRACE=trace, POSTTRAIN_FOLLOWER="1")
    clone.run("pipelines.commands.sync")
    return clone

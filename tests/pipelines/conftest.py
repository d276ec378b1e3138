"""A small project with its own step, and a tracking store that is made once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.tracking.store import open_client

STEP = '''
"""Counts steps. Reads steps.txt for how many."""
import os, signal, sys, time
from pathlib import Path
from pipelines.runtime.step import Run, main
from posttrain.errors import DataError, Interrupted

def run(run: Run) -> None:
    last = int(Path("steps.txt").read_text())
    rate = run.context.params.sft.optimizer.learning_rate
    cursor = run.context.checkpoints / "cursor"
    done = int(cursor.read_text()) if cursor.exists() else -1
    run.recorder.truncate_after(done)
    run.recorder.tag("flavour", "plain")
    for step in range(done + 1, last):
        if run.context.stop_requested():
            raise Interrupted("stopped at a safe point")
        run.recorder.metrics(step, {"loss": rate / (step + 1), "odd": float("nan") if step % 2 else float("inf")})
        run.recorder.timings(step, {"seconds/step": 0.25})
        run.recorder.judged("referee", 10, 1)
        if step % 5 == 4:
            run.recorder.table("samples", step, [{"prompt": "1+1", "completion": str(step), "score": float("nan")}])
            run.context.checkpoints.mkdir(parents=True, exist_ok=True)
            cursor.write_text(str(step))
        if os.environ.get("DIE_AT") == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("TERM_AT") == str(step):
            os.kill(os.getpid(), signal.SIGTERM)
        if os.environ.get("FAIL_AT") == str(step):
            kinds = {"data": DataError, "bug": ZeroDivisionError, "memory": RuntimeError}
            cause = ValueError(os.environ["FAIL_CAUSE"]) if "FAIL_CAUSE" in os.environ else None
            raise kinds[os.environ["FAIL_WITH"]](os.environ.get("FAIL_TEXT", "no")) from cause
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        if Path("enough").exists():
            break
    if "READ" in os.environ:
        print(run.context.params.reward.epochs)
    run.outputs.artifact("note.txt").write_text("finished")
    run.recorder.summary({"heldout/accuracy": 0.75, "pass@4": 0.5, "loss": rate / last})

if __name__ == "__main__":
    main(run, "count", params=lambda args: ("sft", f"algorithms.{args.algorithm}"), inputs=("steps.txt",),
         arguments=lambda p: (p.add_argument("--algorithm", default="grpo"), p.add_argument("--seed", type=int, default=0)),
         variant=lambda args: f"{args.algorithm}-{args.seed}")
'''


def wait_for(condition: Callable[[], Any], seconds: float = 150.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return answer


class Project:
    """A folder with params.yaml and the step above, run as users run it."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.directory = folder / "runs" / "count" / "grpo-0"
        self._root = root
        (folder / "steps").mkdir()
        (folder / "steps" / "count.py").write_text(STEP)
        (folder / "steps.txt").write_text("12")
        shutil.copy(root / "params.yaml", folder)

    def beside(self, name: str) -> Project:
        """A second project in a folder of this one."""
        folder = self.folder / name
        folder.mkdir()
        return Project(folder, self._root)

    def start(self, *arguments: str, module: str = "count", **env: str) -> subprocess.Popen[str]:
        path = f"{self.folder / 'steps'}:{self._root}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_TRACKING", "POSTTRAIN_", "DVC_"))}
        environ = inherited | {"PYTHONPATH": path, "POSTTRAIN_FOLLOWER": "1"} | env
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str, module: str = "count", **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, module=module, **env)
        out, err = process.communicate(timeout=180)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def state(self) -> Path:
        (state,) = (self.folder / ".posttrain" / "runs").iterdir()
        return state


@pytest.fixture
def project(tmp_path: Path, root: Path) -> Project:
    return Project(tmp_path, root)


@pytest.fixture
def store(project: Project, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An MLflow client of the project's own SQLite store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, project.folder / "mlflow.db")
    return open_client(project.folder)


@pytest.fixture
def history() -> Callable[[Any, str], dict[str, list[tuple[int, float]]]]:
    """Every value of a run, by metric, in order of steps: an extra value shows."""

    def read(client: Any, run_id: str) -> dict[str, list[tuple[int, float]]]:
        names = sorted(client.get_run(run_id).data.metrics)
        series = {name: client.get_metric_history(run_id, name) for name in names}
        return {name: sorted((m.step, m.value) for m in values) for name, values in series.items()}

    return read

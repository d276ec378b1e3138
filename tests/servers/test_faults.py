"""Servers that die in the middle of a night, and databases that come back from a back-up. For the slow tier."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import psutil
import pytest

from pipelines.runtime.journal import ended, read
from tests.servers.conftest import Scene, wait
from tests.sockets import command_line

pytestmark = [
    pytest.mark.servers,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]


def test_a_night_survives_the_death_of_prefect_mlflow_and_the_database(scene: Scene) -> None:
    run = scene.fire()
    wait(lambda: next(iter((scene.root / ".posttrain/runs").glob("reward-*/journal.jsonl")), None), 400)
    processes = scene.topology.processes
    for name in ("mlflow", "prefect"):
        processes.stop(name, signal.SIGKILL)
    processes.stop("postgres", signal.SIGQUIT)  # PostgreSQL's immediate shutdown: as a crash
    for name in ("postgres", "prefect", "mlflow"):
        scene.topology.start(name)
    scene.completed(run, "why: runs/gate/artifacts/decision.html")
    assert scene.aliases() == {"champion": 1}
    from pipelines.tracking.store import open_client

    client = open_client(scene.root)
    experiment = client.get_experiment_by_name("posttrain")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    stages = {run.data.tags["stage"] for run in runs}
    trained = {"ingest", "base", "validate", "sft", "reward", "reward_readers", "align"}
    assert stages == {*trained, "evaluate", "compare", "gate"}
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_the_databases_come_back_as_they_were_backed_up(scene: Scene, tmp_path: Path) -> None:
    before = scene.aliases()
    scene.command("infra.servers", "backup", str(tmp_path / "dumps"))
    registry = scene.registry()
    registry.tag(1, {"reason": "spoilt"})
    registry.challenge(1)
    assert scene.aliases() != before
    done = scene.clone.run("infra.servers", "restore", str(tmp_path / "dumps"), check=False, **scene.environment)
    assert done.returncode == 2
    assert "worker, prefect, mlflow would write into a database during its replacement" in done.stderr
    scene.command("infra.servers", "stop", "worker", "prefect", "mlflow")
    torn = shutil.copytree(tmp_path / "dumps", tmp_path / "torn")
    (torn / "mlflow_auth.dump").write_bytes(b"")
    done = scene.clone.run("infra.servers", "restore", str(torn), check=False, **scene.environment)
    assert done.returncode == 2
    assert "input file is too short" in done.stderr
    assert scene.topology.postgres.query("mlflow", "SELECT count(*) FROM model_versions") != "0"
    scene.command("infra.servers", "restore", str(tmp_path / "dumps"))
    scene.command("infra.servers", "up")
    assert scene.aliases() == before
    assert scene.registry().version(1).tags["reason"] == "every check was passed"


def more_pairs(scene: Scene, count: int) -> None:
    """New data, after which the reward model and everything below it are stale."""
    pairs = ({"prompt": f"m{count}-{i}?", "chosen": "1", "rejected": "0"} for i in range(count))
    scene.put(f"preferences/more-{count}.jsonl", *pairs)


def reward_runs(scene: Scene) -> set[Path]:
    return set((scene.root / ".posttrain" / "runs").glob("reward-*"))


def training(scene: Scene, before: set[Path]) -> Path:
    """Return the run of a new reward model, once it has a checkpoint."""

    def look() -> Path | None:
        return next((run for run in reward_runs(scene) - before if next(run.glob("checkpoints/*/step-*"), None)), None)

    found: Path = wait(look, 400)
    return found


def status_in_mlflow(scene: Scene, run: Path) -> str:
    """Of the newest MLflow run of this run's identity."""
    from pipelines.tracking.describe import RUN_TAG
    from pipelines.tracking.store import open_client

    client = open_client(scene.root)
    experiment = client.get_experiment_by_name("posttrain")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`{RUN_TAG}` = '{run.name}'")
    return str(found.info.status)


def test_a_cancelled_night_stops_its_stage_at_a_checkpoint_and_the_next_one_goes_on(scene: Scene) -> None:
    before = reward_runs(scene)
    more_pairs(scene, 2000)  # half a minute of training: the cancellation comes before its end on any machine
    night = scene.fire()
    run = training(scene, before)
    family = worker_family(scene)
    scene.command("prefect", "flow-run", "cancel", str(night.id))
    # Once told, a step has the grace of eight seconds, else its guard kills it, and its journal has no end.
    wait(lambda: True if ended(read(run / "journal.jsonl")) == "KILLED" else None, 60)
    state = scene.ended(night, 120).state
    assert state is not None
    assert state.is_cancelled()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    assert next(run.glob("checkpoints/*/step-*"))
    assert status_in_mlflow(scene, run) == "KILLED"

    scene.completed(scene.fire(), "why: runs/gate/artifacts/decision.html")
    assert "reward: continuing run reward-" in (scene.root / ".posttrain/logs/reward.log").read_text(encoding="utf-8")
    assert status_in_mlflow(scene, run) == "FINISHED"


def test_a_night_whose_process_is_killed_under_its_worker_is_told_to_the_webhook(scene: Scene) -> None:
    before, told = reward_runs(scene), len(scene.told)
    more_pairs(scene, 2001)
    night = scene.fire()
    training(scene, before)
    engine = next(process for process in worker_family(scene) if "prefect.engine" in command_line(process))
    engine.kill()
    state = scene.ended(night, 120).state
    assert state is not None
    assert state.is_crashed()
    message = wait(lambda: next(iter(scene.told[told:]), None), 60)
    assert message["event"] == "failed"
    assert f"retrain ({night.name}) ended Crashed" in message["text"]
    assert str(night.id) in message["links"]["flow run"]


def worker_family(scene: Scene) -> list[psutil.Process]:
    """Return the flow that the worker runs, with everything below it."""
    pid = scene.topology.processes.pid("worker")
    assert pid is not None
    return psutil.Process(pid).children(recursive=True)

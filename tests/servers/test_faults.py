"""Servers that die in the middle of a night, and databases that come back from a back-up. For the slow tier."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.servers.conftest import Scene, wait

pytestmark = [
    pytest.mark.servers,
    pytest.mark.slow,
    pytest.mark.xdist_group("servers"),
    pytest.mark.timeout(1200),
]


def test_a_night_survives_the_death_of_prefect_mlflow_and_the_database(scene: Scene) -> None:
    run = scene.fire()
    wait(lambda: next(iter((scene.root / ".posttrain/runs").glob("reward-*/checkpoints/*")), None), 400)
    processes = scene.topology.processes
    for name in ("mlflow", "prefect"):
        processes.stop(name, signal.SIGKILL)
    processes.stop("postgres", signal.SIGQUIT)  # PostgreSQL's immediate shutdown: as a crash
    for name in ("postgres", "prefect", "mlflow"):
        scene.topology.start(name)
    ended = scene.ended(run)
    assert ended.state is not None
    assert ended.state.is_completed(), scene.log(run)
    assert scene.aliases() == {"champion": 1}
    from pipelines.tracking.store import open_client

    client = open_client(scene.root)
    experiment = client.get_experiment_by_name("posttrain")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    stages = {run.data.tags["stage"] for run in runs}
    assert stages == {"ingest", "base", "validate", "sft", "reward", "align", "evaluate", "compare", "gate"}
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
    assert "worker, prefect, mlflow would write into a database that is being replaced" in done.stderr
    scene.command("infra.servers", "stop", "worker", "prefect", "mlflow")
    scene.command("infra.servers", "restore", str(tmp_path / "dumps"))
    scene.command("infra.servers", "up")
    assert scene.aliases() == before
    assert scene.registry().version(1).tags["reason"] == "every check was passed"

"""Forgotten rows are deleted from artifacts that MLflow keeps outside the project: in a folder elsewhere, and behind a server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.commands import forget as command
from pipelines.tracking.store import open_client
from posttrain import network
from posttrain.guard import signal_at_parents_death
from tests.pipelines.lineage.test_erasure import FILE, OTHER, ROW, holders, project  # noqa: F401  (a fixture)
from tests.pipelines.lineage.test_lineage import Nights, parquet


def log_copies(folder: Path, location: str | None) -> dict[str, str]:
    """Log artifacts of two runs of the project's experiment, of which one is deleted; return the ids of the runs by name."""
    client = open_client(folder)
    found = client.get_experiment_by_name("posttrain")
    experiment = client.create_experiment("posttrain", location) if found is None else found.experiment_id
    (folder / "made").mkdir()
    (folder / "made/samples.json").write_text(json.dumps({"data": [[ROW["prompt"]]]}))
    (folder / "made/rollouts.parquet").write_bytes(parquet([{"log": f"user: {ROW['chosen']}"}]))
    (folder / "made/other.json").write_text(json.dumps(OTHER))
    runs = {}
    for name in ("kept", "deleted"):
        runs[name] = str(client.create_run(experiment, run_name=name).info.run_id)
        client.log_artifacts(runs[name], str(folder / "made"), "artifacts")
    client.delete_run(runs["deleted"])
    shutil.rmtree(folder / "made")
    return runs


def forgets_copies(stored: Path, runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that the command names and deletes exactly the artifacts that quote the rows."""
    quoting = [f"{runs[name]}/artifacts/{file}" for name in runs for file in ("rollouts.parquet", "samples.json")]
    assert len(holders(stored)) == 4
    assert command.main([str(FILE)]) == 0
    listed = "".join(f"  {each}\n" for each in sorted(quoting))
    assert f"artifacts of MLflow outside the project, as run/path: 4\n{listed}" in capsys.readouterr().out
    assert len(holders(stored)) == 4
    assert command.main([str(FILE), "--yes"]) == 0
    assert holders(stored) == []
    assert len(list(stored.rglob("other.json"))) == 2


def test_artifacts_in_a_different_folder(
    project: Nights,  # noqa: F811
    empty_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(empty_store, project.root / "mlflow.db")
    stored = tmp_path / "stored"
    forgets_copies(stored, log_copies(project.root, stored.as_uri()), capsys)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Run MLflow's own server, which keeps artifacts and passes them on."""
    folder.mkdir()
    port = network.free_port()
    options = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination",
        str(folder / "stored"),
    ]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", network.HOST, "--port", str(port), "--workers", "1", *options],
            stdout=log, stderr=subprocess.STDOUT, cwd=folder, preexec_fn=signal_at_parents_death,
        )  # fmt: skip
    address = f"http://{network.HOST}:{port}"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    try:
        assert network.wait_until(answers, lambda: process.poll() is None, 180), (folder / "server.log").read_text()
        yield address
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
@pytest.mark.servers
def test_artifacts_behind_a_server(
    project: Nights,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{network.HOST}:{network.free_port()}")
    before = holders(project.root)
    assert command.main([str(FILE), "--yes"]) == 2
    assert "Nothing was deleted." in capsys.readouterr().err
    assert holders(project.root) == before
    with server(tmp_path / "server") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        runs = log_copies(project.root, None)
        assert open_client(project.root).get_run(runs["kept"]).info.artifact_uri.startswith("mlflow-artifacts:/")
        forgets_copies(tmp_path / "server/stored", runs, capsys)

"""A second clone pulls the pushed results: no stage runs again, the models load, and its MLflow shows the first clone's numbers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM

from tests.end_to_end.conftest import Clone
from tests.end_to_end.test_pipeline import lock, stages
from tests.s3 import CREDENTIALS, serving

pytestmark = [pytest.mark.timeout(900), pytest.mark.servers]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with serving("depot") as url:
        yield url


@pytest.fixture(params=["folder", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> list[tuple[str, ...]]:
    """Return the `dvc` commands that make the remote known to a clone. They write to config.local, which git does not see."""
    if request.param == "folder":
        return [("remote", "add", "--local", "-d", "depot", str(tmp_path / "depot"))]
    url = request.getfixturevalue("s3")
    return [
        ("remote", "add", "--local", "-d", "depot", "s3://depot/posttrain"),
        ("remote", "modify", "--local", "depot", "endpointurl", url),
    ]


def test_a_fresh_clone_pulls_and_runs_nothing(reproduced: Clone, remote: list[tuple[str, ...]], tmp_path: Path) -> None:
    other = Clone(tmp_path / "clone")
    subprocess.run(["git", "clone", "-q", str(reproduced.root), str(other.root)], check=True)
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(reproduced.root / name, other.root)
    local = reproduced.root / ".dvc" / "config.local"
    try:
        for clone in (reproduced, other):
            for command in remote:
                clone.run("dvc", *command)
        reproduced.run("dvc", "push", "-q", **CREDENTIALS)
    finally:
        local.unlink(missing_ok=True)
    other.run("dvc", "pull", "-q", **CREDENTIALS)
    output = other.repro(**CREDENTIALS)
    assert "Running stage" not in output
    assert "up to date" in output
    assert lock(other) == lock(reproduced)
    models = sorted((reproduced.root / "models").rglob("model.safetensors"))
    assert len(models) == 6
    for model in models:
        assert (other.root / model.relative_to(reproduced.root)).read_bytes() == model.read_bytes()
    assert AutoModelForCausalLM.from_pretrained(other.root / "models" / "align" / "ppo-0").config.model_type == "qwen3"
    assert not (other.root / "mlflow.db").exists()
    other.run("pipelines.commands.sync")
    assert projected(other) == projected(reproduced)
    assert len(projected(other)) == len(stages(other))


def projected(clone: Clone) -> dict[str, object]:
    """By run: status, parameters and every value of every metric that a result has. Timings stay with the machine that took them."""
    client = MlflowClient(f"sqlite:///{clone.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("posttrain")
    assert experiment is not None
    found: dict[str, object] = {}
    for run in client.search_runs([experiment.experiment_id], max_results=100):
        names = [
            n for n in run.data.metrics if not n.startswith(("seconds/", "throughput/", "memory/", "cost/seconds"))
        ]
        series = {
            n: sorted((m.step, str(m.value)) for m in client.get_metric_history(run.info.run_id, n)) for n in names
        }
        artifacts = sorted(info.path for info in client.list_artifacts(run.info.run_id, "artifacts"))
        assert run.data.tags["posttrain.run"] not in found
        found[run.data.tags["posttrain.run"]] = (run.info.status, run.data.params, series, artifacts)
    return found

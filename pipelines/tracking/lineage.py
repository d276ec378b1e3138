"""Tell MLflow which tables a run read, and which model it wrote with which metrics."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from pipelines.runtime.journal import FINISHED
from pipelines.tracking.source import RecordedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

CONTEXTS = {"evaluation": "evaluation", "preferences_heldout": "validation"}
_DIGEST_LENGTH = 32
"""MLflow accepts at most 36 characters."""


def tables(source: RecordedRun) -> dict[str, str]:
    """Return the sha256 of each table that the run read, by the table's path."""
    inputs = source.start.get("inputs", {})
    return {path: digest for path, digest in inputs.items() if path.startswith("data/")}


def log_datasets(client: MlflowClient, run_id: str, source: RecordedRun) -> None:
    """Record the tables as inputs of the MLflow run. MLflow keeps one input per name and digest."""
    inputs = [_dataset(path, digest) for path, digest in tables(source).items()]
    if inputs:
        client.log_inputs(run_id, inputs)


def _dataset(path: str, digest: str) -> DatasetInput:
    """Return one table as MLflow's dataset input."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name = PurePosixPath(path).stem
    dataset = Dataset(name, digest[:_DIGEST_LENGTH], "local", json.dumps({"uri": path}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", CONTEXTS.get(name, "training"))])


def logged_model(client: MlflowClient, experiment: str, run_id: str, source: RecordedRun) -> str | None:
    """Return the id of MLflow's model for the weights that a finished run wrote, and create it if necessary; None without weights."""
    from mlflow.entities import LoggedModelOutput

    written = source.of("model")
    if not written or source.status != FINISHED:
        return None
    present = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    if present:
        return str(present[0].model_id)
    model = written[-1]
    tags = {"path": model["path"], "sha256": model["sha256"]}
    created = client.create_logged_model(
        experiment, str(source.start["name"]), run_id, tags, model_type="transformers weights kept by DVC"
    )
    client.finalize_logged_model(created.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(created.model_id, 0)])
    return str(created.model_id)

"""A project that is renamed, moved or copied keeps its artifacts and writes new ones to its own folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.tracking.relocation import relocate_artifacts
from pipelines.tracking.store import experiment_id, open_client


def test_a_renamed_and_a_copied_project_have_their_artifacts(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old, new, copied = (tmp_path / name for name in ("first place", "second place", "third"))
    old.mkdir()
    shutil.copy(empty_store, old / "mlflow.db")
    client = open_client(old)
    run = client.create_run(experiment_id(client, "demo", old)).info.run_id
    client.log_text(run, "before", "notes/before.txt")
    assert relocate_artifacts(old, old / "mlflow.db") == 0

    shutil.move(old, new)
    moved = open_client(new)
    assert [each.path for each in moved.list_artifacts(run, "notes")] == ["notes/before.txt"]
    second = moved.create_run(experiment_id(moved, "demo", new)).info
    moved.log_text(second.run_id, "after", "notes/after.txt")
    assert second.artifact_uri.startswith((new / "mlartifacts").as_uri() + "/")
    assert not old.exists(), "nothing is written to the old folder"

    shutil.copytree(new, copied)
    copy = open_client(copied)
    copy.log_text(copy.create_run(experiment_id(copy, "demo", copied)).info.run_id, "in the copy", "notes/copy.txt")
    names = {path.name for path in copied.rglob("notes/*")}
    assert names == {"before.txt", "after.txt", "copy.txt"}
    assert {path.name for path in new.rglob("notes/*")} == {"before.txt", "after.txt"}
    assert moved.get_experiment_by_name("demo").artifact_location == (new / "mlartifacts").as_uri()


def test_artifacts_that_stayed_in_a_folder_elsewhere_are_left_there(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "mlartifacts").mkdir(parents=True)
    new.mkdir()
    shutil.copy(empty_store, old / "mlflow.db")
    client = open_client(old)
    experiment_id(client, "demo", old)
    shutil.move(old / "mlflow.db", new)
    assert relocate_artifacts(new, new / "mlflow.db") == 0
    assert relocate_artifacts(new, new / "missing.db") == 0

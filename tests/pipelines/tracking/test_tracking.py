"""MLflow shows the journal's values: each once, whatever happened, and no secrets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.runtime.journal import Journal
from pipelines.tracking.projection import Projector
from pipelines.tracking.projection import project as project_folder
from pipelines.tracking.source import load
from posttrain.errors import TrackingError
from tests.pipelines.conftest import Project

START: dict[str, Any] = {
    "kind": "start",
    "stage": "align",
    "name": "align-grpo-0",
    "key": "0" * 64,
    "run": "align-grpo-0-" + "0" * 16,
    "arguments": {"algorithm": "grpo", "seed": 0},
    "directory": "runs/align/grpo-0",
    "inputs": {},
}
END = {"kind": "end", "status": "FINISHED"}


def write(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "journal.jsonl").unlink(missing_ok=True)
    journal = Journal(folder / "journal.jsonl")
    for record in (START, *records):
        journal.append(record)
    journal.close()
    return folder


def series(name: str, values: list[float]) -> list[dict[str, Any]]:
    return [{"kind": "metrics", "step": step, "values": {name: value}} for step, value in enumerate(values)]


def everything(client: Any, history: Any) -> list[Any]:
    """All that a store holds, to compare before and after."""
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return sorted((r.info.run_id, str(r.to_dictionary()), str(history(client, r.info.run_id))) for r in runs)


def test_a_finished_step_is_shown_with_all_it_has(project: Project, store: Any, history: Any) -> None:
    project.run()
    run = store.get_run(project_folder(project.state, store, project.folder))
    values = history(store, run.info.run_id)
    assert values["loss"] == [(step, 2e-3 / (step + 1)) for step in range(12)]
    assert [value for _, value in values["odd"][:2]] == [1.7976931348623157e308, pytest.approx(math.nan, nan_ok=True)]
    assert values["heldout/accuracy"] == [(11, 0.75)]
    assert values["pass_at_4"] == [(11, 0.5)]
    assert not [name for name in values if name.startswith("final/")]
    assert len(values["seconds/step"]) == 12
    assert (run.info.run_name, run.info.status) == ("count grpo seed 0", "FINISHED")
    assert run.data.params["sft.optimizer.learning_rate"] == "0.002"
    assert not any(name.startswith(("reward.", "data.")) for name in run.data.params)
    expected = {"stage": "count", "algorithm": "grpo", "seed": "0", "flavour": "plain"}
    assert expected.items() <= run.data.tags.items()
    assert run.data.tags["posttrain.run"] == project.state.name
    assert "runs/count/grpo-0" in run.data.tags["mlflow.note.content"]
    assert "report/" in run.data.tags["mlflow.note.content"]


def test_tables_and_journal_become_artifacts(project: Project, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    project.run()
    run_id = project_folder(project.state, store, project.folder)
    files = {info.path for info in [*store.list_artifacts(run_id), *store.list_artifacts(run_id, "artifacts")]}
    tables = {"artifacts/samples-000004.json", "artifacts/samples-000009.json"}
    assert files == {"artifacts", "artifacts/note.txt", "journal.jsonl"} | tables
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri)
    table = store.load_table(store.get_run(run_id).info.experiment_id, "artifacts/samples-000009.json", [run_id])
    assert table[["prompt", "completion"]].to_dict("list") == {"prompt": ["1+1"], "completion": [9]}
    local = Path(store.download_artifacts(run_id, "journal.jsonl"))
    assert local.read_bytes() == (project.directory / "journal.jsonl").read_bytes()


def test_projecting_twice_changes_nothing(project: Project, store: Any, history: Any) -> None:
    project.run()
    project_folder(project.state, store, project.folder)
    before = everything(store, history)
    project_folder(project.state, store, project.folder)
    project_folder(project.directory, store, project.folder)
    assert everything(store, history) == before
    assert len(before) == 1


def test_a_growing_journal_is_continued(project: Project, store: Any, history: Any) -> None:
    folder, losses = project.folder / "live", [1.0, 0.5, 0.25, 0.125]
    folder.mkdir()
    projector = Projector(store, project.folder)
    for known in (1, 3, 4):
        write(folder, *series("loss", losses[:known]))
        source = load(folder)
        assert source is not None
        run_id = projector.project(source)
        assert history(store, run_id)["loss"] == list(enumerate(losses[:known]))
    write(folder, *series("loss", losses), END)
    assert project_folder(folder, store, project.folder) == run_id
    assert store.get_run(run_id).info.status == "FINISHED"


def test_metrics_are_added_in_the_order_of_the_charts(project: Project, store: Any) -> None:
    folder = project.folder / "ordered"
    folder.mkdir()
    names = ["advantage/std", "entropy", "loss", "reward/answer/mean", "reward/total/mean", "throughput"]
    write(folder, {"kind": "metrics", "step": 0, "values": dict.fromkeys(names, 1.0)})
    stored = store.get_run(project_folder(folder, store, project.folder)).data.metrics
    assert list(stored) == [
        "reward/total/mean", "reward/answer/mean", "entropy", "loss", "advantage/std", "throughput",
    ]  # fmt: skip


def test_more_values_than_one_call_takes(project: Project, store: Any, history: Any) -> None:
    folder = project.folder / "long"
    folder.mkdir()
    write(folder, *series("loss", [1 / (s + 1) for s in range(2345)]), END)
    run_id = project_folder(folder, store, project.folder)
    assert history(store, run_id)["loss"] == [(s, 1 / (s + 1)) for s in range(2345)]


def test_another_outcome_of_the_same_run_replaces_the_first(project: Project, store: Any, history: Any) -> None:
    folder = project.folder / "again"
    folder.mkdir()
    first = project_folder(write(folder, *series("loss", [1.0, 0.5]), END), store, project.folder)
    second = project_folder(write(folder, *series("loss", [1.0, 0.4]), END), store, project.folder)
    assert first != second
    assert store.get_run(first).info.lifecycle_stage == "deleted"
    assert history(store, second) == {"loss": [(0, 1.0), (1, 0.4)]}
    shorter = project_folder(write(folder, *series("loss", [1.0]), END), store, project.folder)
    assert history(store, shorter) == {"loss": [(0, 1.0)]}
    assert len(store.search_runs([store.get_run(shorter).info.experiment_id])) == 1


def test_a_run_deleted_by_hand_stays_deleted(project: Project, store: Any) -> None:
    folder = project.folder / "unwanted"
    folder.mkdir()
    run_id = project_folder(write(folder, *series("loss", [1.0]), END), store, project.folder)
    store.delete_run(run_id)
    assert project_folder(folder, store, project.folder) == run_id
    assert store.search_runs([store.get_run(run_id).info.experiment_id]) == []


def test_an_experiment_deleted_by_hand_is_named_with_the_command_that_restores_it(
    project: Project, store: Any, history: Any
) -> None:
    project.run()
    run = project_folder(project.state, store, project.folder)
    experiment = store.get_run(run).info.experiment_id
    before = str(history(store, run))
    store.delete_experiment(experiment)
    words = (
        rf"the MLflow experiment 'posttrain' was deleted\. Restore it with `mlflow experiments restore -x {experiment}`"
    )
    with pytest.raises(TrackingError, match=words):
        project_folder(project.state, store, project.folder)
    store.restore_experiment(experiment)
    assert str(history(store, project_folder(project.state, store, project.folder))) == before


def test_a_finished_run_of_another_checkout_is_found_not_repeated(project: Project, store: Any, tmp_path: Path) -> None:
    project.run()
    run_id = project_folder(project.state, store, project.folder)
    elsewhere = tmp_path / "clone"
    elsewhere.mkdir()
    (elsewhere / "params.yaml").write_bytes((project.folder / "params.yaml").read_bytes())
    assert project_folder(project.directory, store, elsewhere) == run_id


def test_a_clock_that_goes_backwards_moves_no_value(project: Project, store: Any, history: Any) -> None:
    folder = project.folder / "clock"
    folder.mkdir()
    write(folder, *series("loss", [1.0, 0.5, 0.25]), END)
    measured = Journal(folder / "measurements.jsonl", durable=False)
    for number, time in enumerate((2000.0, 1500.0, 3000.0, 1000.0, 500.0)):
        kind = {"kind": "step", "step": number - 1} if 1 <= number <= 3 else {"kind": "start" if number == 0 else "end"}
        measured.append(kind | {"time": time})
    measured.close()
    run_id = project_folder(folder, store, project.folder)
    # from the start at 2000 s to the latest record at 3000 s
    assert history(store, run_id) == {"loss": [(0, 1.0), (1, 0.5), (2, 0.25)], "cost/seconds": [(0, 1000.0)]}
    times = {m.step: m.timestamp for m in store.get_metric_history(run_id, "loss")}
    assert times == {0: 1_500_000, 1: 3_000_000, 2: 1_000_000}
    run = store.get_run(run_id)
    assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 0.25)
    assert project_folder(folder, store, project.folder) == run_id
    assert len(store.search_runs([run.info.experiment_id])) == 1


def test_failure_is_shown_with_reason_and_traceback(project: Project, store: Any) -> None:
    project.run(FAIL_AT="3", FAIL_WITH="bug", FAIL_TEXT="lost")
    run_id = project_folder(project.state, store, project.folder)
    run = store.get_run(run_id)
    assert (run.info.status, run.data.tags["posttrain.reason"]) == ("FAILED", "ZeroDivisionError: lost")
    assert "artifacts/traceback.txt" in {info.path for info in store.list_artifacts(run_id, "artifacts")}
    project.run()
    assert project_folder(project.state, store, project.folder) == run_id
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "posttrain.reason" not in run.data.tags


def test_tags_name_what_dvc_keeps_of_exactly_this_run(project: Project, store: Any) -> None:
    project.run()
    from hashlib import md5

    digest = md5((project.directory / "journal.jsonl").read_bytes()).hexdigest()
    outs = [{"path": "runs/count/grpo-0/journal.jsonl", "md5": digest}, {"path": "models/count", "md5": "abc.dir"}]
    lock = project.folder / "dvc.lock"
    lock.write_text(json.dumps({"schema": "2.0", "stages": {"count@grpo-0": {"cmd": "x", "outs": outs}}}))
    run_id = project_folder(project.state, store, project.folder)
    assert json.loads(store.get_run(run_id).data.tags["dvc.md5"])["models/count"] == "abc.dir"
    stale = lock.read_text().replace(digest, "0" * 32).replace("abc.dir", "def.dir")
    lock.write_text(stale)
    project_folder(project.state, store, project.folder)
    assert json.loads(store.get_run(run_id).data.tags["dvc.md5"])["models/count"] == "abc.dir"


def test_no_secret_reaches_the_store(project: Project, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPOT_TOKEN", "open-sesame-42")
    folder = project.folder / "secret"
    folder.mkdir()
    (project.folder / ".dvc").mkdir()
    config = "[core]\n    remote = depot\n['remote \"depot\"']\n    url = https://anna:hunter2@depot/dvc\n"
    (project.folder / ".dvc" / "config").write_text(config)
    leak = {"kind": "tags", "values": {"origin": "s3://anna:hunter2@bucket/x?token=hunter2 open-sesame-42"}}
    model = {"kind": "model", "path": "models/x", "sha256": "0" * 64, "files": {}}
    run_id = project_folder(write(folder, leak, model, END), store, project.folder)
    tags = store.get_run(run_id).data.tags
    assert tags["origin"] == "s3://***@bucket/x?token=*** ***"
    assert tags["posttrain.model.remote"] == "https://***@depot/dvc"
    files = [project.folder / "mlflow.db", *(project.folder / "mlartifacts").rglob("*"), *folder.rglob("*")]
    contents = [path.read_bytes() for path in files if path.is_file()]
    assert len(contents) >= 3
    assert not any(secret in data for data in contents for secret in (b"hunter2", b"open-sesame"))

"""Answers in MLflow as traces: of an evaluation, once each, with run, model and rewards; forgotten texts leave the database's bytes."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from pipelines.commands.sync import synchronise
from pipelines.config.params import load_params
from pipelines.runtime.journal import encode, read
from pipelines.tracking.erasure import erase_traces, find_traces
from pipelines.tracking.projection import Projector
from pipelines.tracking.served import FOLDER, PER_FILE, ServedTraces, append_served, read_served
from pipelines.tracking.source import discover
from pipelines.tracking.store import open_client
from posttrain.errors import ConfigError
from tests.pipelines.tracking.test_results import END, STARTS, start, write

SECRET = "sk-abcdefghijklmnopqrstuvwx"
ROWS = [
    {"prompt": f"{n}+{n}=", "completion": f"the answer {SECRET if n == 1 else n} é", "answer": float(n % 2), "rm": -0.5}
    for n in range(6)
]


@pytest.fixture
def project(tmp_path: Path, root: Path, empty_store: Path) -> Path:
    """A finished align run and the evaluation of its model, with a table of six samples."""
    shutil.copy(root / "params.yaml", tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    model = {"kind": "model", "path": "models/align/grpo-0", "sha256": "a" * 64, "content": "b" * 64, "files": {}}
    write(
        tmp_path / "runs/align/grpo-0", start("align", "grpo-0", {"algorithm": "grpo", "seed": 0}, STARTS), model, END
    )
    folder = tmp_path / "runs/evaluate/grpo-0"
    evaluated = STARTS | {"models/align/grpo-0": "b" * 64}
    table = {"kind": "table", "name": "samples", "step": 0, "path": "artifacts/samples-000000.json", "rows": 6}
    done = {"kind": "summary", "values": {"accuracy": 0.5}}
    write(folder, start("evaluate", "grpo-0", {"model": "grpo-0"}, evaluated), table, done, END)
    (folder / "artifacts").mkdir()
    (folder / "artifacts/samples-000000.json").write_text(json.dumps(ROWS))
    return tmp_path


def change(project: Path, section: str, name: str, value: object) -> None:
    tree = YAML().load(project / "params.yaml")
    tree[section][name] = value
    YAML().dump(tree, project / "params.yaml")


def test_an_evaluation_has_its_first_answers_as_traces_once_each(project: Path) -> None:
    client = open_client(project)
    synchronise(project, 0)
    (experiment,) = (str(each.experiment_id) for each in client.search_experiments(filter_string="name = 'posttrain'"))
    (run,) = client.search_runs([experiment], "tags.stage = 'align'")
    (model,) = client.search_logged_models([experiment])
    first = sorted(client.search_traces(locations=[experiment]), key=lambda trace: trace.info.request_preview)
    assert [trace.info.request_preview for trace in first] == ["0+0=", "1+1=", "2+2=", "3+3="]
    assert first[3].data.spans[0].inputs == {"prompt": "3+3="}
    assert first[3].data.spans[0].outputs == {"completion": "the answer 3 é"}
    assert first[1].data.spans[0].outputs == {"completion": "the answer *** é"}
    assert {note.name: note.feedback.value for note in first[3].info.assessments} == {"answer": 1.0, "rm": -0.5}
    assert {name: first[0].info.tags[name] for name in ("algorithm", "seed", "model")} == {
        "algorithm": "grpo",
        "seed": "0",
        "model": "grpo-0",
    }
    ids = {trace.info.trace_id for trace in first}
    assert {each.info.trace_id for each in client.search_traces(locations=[experiment], run_id=run.info.run_id)} == ids
    assert {each.info.trace_id for each in client.search_traces(locations=[experiment], model_id=model.model_id)} == ids

    synchronise(project, 0)
    Projector(client, project).project(next(s for s in discover(project, []) if s.start["stage"] == "align"))
    assert {trace.info.trace_id for trace in client.search_traces(locations=[experiment])} == ids

    change(project, "tracking", "traces", 1)
    synchronise(project, 0)
    (left,) = client.search_traces(locations=[experiment])
    assert left.info.request_preview == "0+0="

    journal = project / "runs/evaluate/grpo-0/journal.jsonl"
    journal.write_text("".join(map(encode, read(journal))).replace('"accuracy": 0.5', '"accuracy": 0.25'))
    synchronise(project, 0)
    (again,) = client.search_traces(locations=[experiment])
    assert again.info.trace_id != left.info.trace_id, "a new evaluation replaces the traces of the one before"
    change(project, "tracking", "traces", 0)
    synchronise(project, 0)
    assert not client.search_traces(locations=[experiment])


def test_a_run_that_kept_rollouts_has_its_ends_as_traces_once_each(project: Path) -> None:
    shutil.rmtree(project / "runs")
    folder = project / "runs/align/grpo-0"
    kept = {"kind": "artifact", "step": 3, "path": "artifacts/rollouts-000003.parquet"}
    write(folder, start("align", "grpo-0", {"algorithm": "grpo", "seed": 0}, STARTS), kept, END)
    rollouts = [
        {"kind": "answer", "prompt": "1+1=", "completion": text, "reward": true, "reward/answer": true, "reward/rm": score,
         "rollout_logprobs": [-0.5], "ref_logprobs": [reference]}
        for text, true, score, reference in (("2", 1.0, 0.5, -0.5), ("3", 0.0, -1.0, -0.5), ("11", 0.0, 2.0, -3.0))
    ]  # fmt: skip
    (folder / "artifacts").mkdir()
    pq.write_table(pa.Table.from_pylist(rollouts), folder / "artifacts/rollouts-000003.parquet")
    change(project, "tracking", "traces", 1)
    client = open_client(project)
    synchronise(project, 0)
    synchronise(project, 0)
    (experiment,) = (str(each.experiment_id) for each in client.search_experiments(filter_string="name = 'posttrain'"))
    (run,) = client.search_runs([experiment], "tags.stage = 'align'")
    found = {
        each.info.tags["chosen"]: each for each in client.search_traces(locations=[experiment], run_id=run.info.run_id)
    }
    assert {kind: each.info.response_preview for kind, each in found.items()} == {
        "highest reward": "2", "lowest reward": "3", "most changed": "11", "high score, low true reward": "11",
    }  # fmt: skip
    fooled = found["high score, low true reward"]
    assert fooled.info.tags["mlflow.traceName"] == "high score, low true reward, step 3"
    scores = {note.name: note.feedback.value for note in fooled.info.assessments}
    assert scores == {"answer": 0.0, "rm": 2.0, "total": 0.0, "log_ratio": 2.5}
    assert len(client.search_traces(locations=[experiment])) == 4
    change(project, "tracking", "traces", 0)
    synchronise(project, 0)
    assert not client.search_traces(locations=[experiment])


def test_more_traces_than_samples_are_refused(project: Path) -> None:
    change(project, "tracking", "traces", 9)
    with pytest.raises(ConfigError, match=r"tracking\.traces = 9 exceeds evaluation\.samples_shown = 8"):
        load_params(project / "params.yaml")


def served(number: int, prompt: object = "who are you?", version: str = "") -> dict[str, object]:
    return {"kind": "served", "id": f"cmpl-{number}-0", "request": f"cmpl-{number}", "time": 1.8e9 + number, "seconds": 0.25,
            "model": "champion", "version": version, "md5": "aa.dir", "shadow": False, "prompt": prompt,
            "completion": f"I am {number}", "finish_reason": "stop", "tokens": 3}  # fmt: skip


def test_served_answers_that_mlflow_missed_are_copied_once_by_sync(project: Path) -> None:
    client = open_client(project)
    synchronise(project, 0)
    (experiment,) = (str(each.experiment_id) for each in client.search_experiments(filter_string="name = 'posttrain'"))
    (run,) = client.search_runs([experiment], "tags.stage = 'align'")
    client.create_registered_model("posttrain")
    client.create_model_version("posttrain", "dvc://models/align/grpo-0?md5=aa.dir", run_id=run.info.run_id)
    chat = [{"role": "user", "content": "hello"}]
    append_served(project, [served(0, version="1"), served(1, chat, "9"), served(2)])
    ServedTraces(project, "posttrain").add(read_served(project)[:1])
    synchronise(project, 0)
    synchronise(project, 0)
    found = client.search_traces(locations=[experiment], filter_string="tags.`posttrain.trace` = 'served'")
    by_request = {trace.info.tags["request"]: trace for trace in found}
    assert sorted(trace.info.tags["request"] for trace in found) == ["cmpl-0", "cmpl-1", "cmpl-2"]
    assert by_request["cmpl-0"].info.trace_metadata["mlflow.sourceRun"] == run.info.run_id
    assert by_request["cmpl-0"].info.tags["version"] == "1"
    assert by_request["cmpl-0"].info.execution_duration == 250
    assert by_request["cmpl-1"].data.spans[0].inputs == {"prompt": chat}
    assert "mlflow.sourceRun" not in by_request["cmpl-1"].info.trace_metadata


def test_the_log_is_kept_in_small_files(project: Path) -> None:
    append_served(project, [served(number) for number in range(PER_FILE + 1)])
    append_served(project, [served(PER_FILE + 1)])
    assert [len(read(path)) for path in sorted((project / FOLDER).iterdir())] == [PER_FILE, 2]
    assert (project / FOLDER).stat().st_mode & 0o777 == 0o700
    assert [record["request"] for record in read_served(project)] == [f"cmpl-{n}" for n in range(PER_FILE + 2)]


def test_a_forgotten_text_leaves_the_bytes_of_the_database(project: Path) -> None:
    text = "she lives behind the old mill"
    append_served(
        project, [served(0), served(1, text), served(2, [{"role": "user", "content": f"is it true? {text}!"}])]
    )
    synchronise(project, 0)
    database = project / "mlflow.db"
    with closing(sqlite3.connect(database)) as store:
        kept = store.execute("select count(*) from runs").fetchone()
    assert database.read_bytes().count(text.encode()) >= 4
    found = find_traces(project, lambda given: text in given)
    assert len(found) == 2
    erase_traces(project, found)
    assert [
        name for name in project.iterdir() if name.name.startswith("mlflow") and text.encode() in name.read_bytes()
    ] == []
    assert find_traces(project, lambda given: text in given) == []
    with closing(sqlite3.connect(database)) as store:
        assert store.execute("select count(*) from runs").fetchone() == kept
    client = open_client(project)
    (experiment,) = (str(each.experiment_id) for each in client.search_experiments(filter_string="name = 'posttrain'"))
    assert len(client.search_traces(locations=[experiment])) == 5, (
        "the evaluation's four, and the answer without the text"
    )

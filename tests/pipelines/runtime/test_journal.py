"""The journal survives torn lines, odd numbers and secrets, and drops the lines after a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipelines.runtime.journal import Journal, Record, canonical, ended, number, read
from pipelines.runtime.redaction import redact
from posttrain.errors import TrackingError


def metrics(step: int, **values: float) -> Record:
    return {"kind": "metrics", "step": step, "values": values}


def test_records_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for step in range(3):
        journal.append(metrics(step, loss=step / 2))
    assert [(r["step"], r["values"]) for r in journal.records()] == [
        (0, {"loss": 0.0}),
        (1, {"loss": 0.5}),
        (2, {"loss": 1.0}),
    ]


def test_numbers_that_json_lacks_make_the_round_trip(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(metrics(0, nan=math.nan, up=math.inf, down=-math.inf))
    line = (tmp_path / "journal.jsonl").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    values = json.loads(line, parse_constant=refuse)["values"]
    assert values == {"nan": "NaN", "up": "Infinity", "down": "-Infinity"}
    assert math.isnan(number(values["nan"]))
    assert number(values["up"]) == math.inf
    assert number(values["down"]) == -math.inf


def test_a_torn_last_line_is_ignored_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).append(metrics(0, loss=1.0))
    with path.open("a") as file:
        file.write('{"kind": "metrics", "st')
    assert [r["step"] for r in read(path)] == [0]
    Journal(path).append(metrics(1, loss=0.5))
    assert [r["step"] for r in read(path)] == [0, 1]


def test_damage_in_the_middle_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"kind": "start"}\n{"kind": \n{"kind": "end"}\n')
    with pytest.raises(TrackingError, match=r"journal\.jsonl, line 2"):
        read(path)


def test_truncation_keeps_what_the_checkpoint_knew(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"kind": "start"})
    journal.append({"kind": "tags", "values": {"a": "1"}})
    for step in range(4):
        journal.append(metrics(step, loss=0.0))
    journal.append({"kind": "table", "name": "samples", "step": 3, "path": "artifacts/samples-000003.json"})
    journal.append({"kind": "summary", "values": {"accuracy": 1}})
    dropped = journal.truncate_after(1)
    assert [r["kind"] for r in dropped] == ["metrics", "metrics", "table", "summary"]
    assert [(r["kind"], r.get("step")) for r in journal.records()] == [
        ("start", None),
        ("tags", None),
        ("metrics", 0),
        ("metrics", 1),
    ]
    journal.append(metrics(2, loss=9.0))
    assert read(journal.path)[-1]["values"] == {"loss": 9.0}
    journal.truncate_after(-1)
    assert [r["kind"] for r in journal.records()] == ["start"]


def test_canonical_form_does_not_know_of_interruptions() -> None:
    start: Record = {"kind": "start", "run": "a"}
    end: Record = {"kind": "end", "status": "FINISHED"}
    calm = [start, {"kind": "tags", "values": {"a": "1"}}, metrics(0, loss=2.0), metrics(1, loss=1.0), end]
    killed: Record = {"kind": "end", "status": "KILLED"}
    rough = [*calm[:3], killed, {"kind": "resume"}, *calm[1:]]
    assert canonical(rough) == canonical(calm) == calm
    assert ended(rough) == "FINISHED"
    assert ended(rough[:4]) == "KILLED"
    assert ended(rough[:5]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://anna:s3cr3t@db/mlflow", "postgresql://***@db/mlflow"),
        ("https://token123@host/path", "https://***@host/path"),
        ("https://b.s3/x?X-Amz-Signature=abc&part=1", "https://b.s3/x?X-Amz-Signature=***&part=1"),
        ("azure://c/x?sv=1&sig=Zm9v%3D", "azure://c/x?sv=1&sig=***"),
        ("hf_" + "a" * 34, "***"),
        ("3 + 4 = 7 at 10:30, see me@home", "3 + 4 = 7 at 10:30, see me@home"),
        ("s3://bucket/path", "s3://bucket/path"),
    ],
)
def test_credentials_are_hidden_and_nothing_else(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_values_of_secret_variables_never_reach_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "correct horse battery")
    monkeypatch.setenv("TOKENIZER_NAME", "arithmetic")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"kind": "params", "values": {"a": ["login correct horse battery"], "b": "arithmetic"}})
    assert journal.records() == [{"kind": "params", "values": {"a": ["login ***"], "b": "arithmetic"}}]

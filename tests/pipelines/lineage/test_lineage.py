"""Lineage over two nights whose records are written here by hand: a file joins the preferences on the second night."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from pipelines.commands import lineage as command
from pipelines.commands.lineage import affected, describe_model, versions_with_row
from pipelines.lineage.commits import COMMIT_TAG, commit_of
from pipelines.lineage.graph import Lineage
from pipelines.lineage.records import PARSED, Artifact, read_records
from pipelines.promotion.registry import Version
from pipelines.runtime.journal import encode
from pipelines.tracking.describe import RUN_TAG
from pipelines.tracking.store import open_client
from posttrain.errors import DataError, TrackingError

FIRST = [{"id": 0, "prompt": "a", "chosen": "1", "rejected": "0"}]
SECOND = [
    {"id": 0, "prompt": "new", "chosen": "2", "rejected": "0"},
    {"id": 1, "prompt": "a", "chosen": "1", "rejected": "0"},
]
NEW = b'{"prompt": "new", "chosen": "2", "rejected": "0"}\n'


class Nights:
    """A project whose DVC cache remembers two nights."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0
        self.locked: dict[str, Any] = {}

    def store(self, content: bytes) -> str:
        """Store an object as DVC does and return its MD5."""
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        path = self.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return md5

    def folder(self, files: dict[str, bytes]) -> str:
        listing = [{"md5": self.store(content), "relpath": name} for name, content in sorted(files.items())]
        content = json.dumps(listing).encode()
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest() + ".dir"
        path = self.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return md5

    def record(self, stage: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        self.count += 1
        entry = {
            "cmd": f"python -m pipelines.{stage}",
            "deps": [{"path": path, "md5": md5} for path, md5 in (inputs | {"pipelines/x.py": "0"}).items()],
            "params": {"params.yaml": {"data": {"preferences": {"source": "raw/pairs"}}}},
            "outs": [{"path": path, "md5": md5} for path, md5 in outputs.items()],
        }
        path = self.root / f".dvc/cache/runs/{self.count:02d}/k{self.count}/v"
        path.parent.mkdir(parents=True)
        YAML().dump(entry, path)
        self.locked[stage.split(" ")[0]] = entry

    def night(self, rows: list[dict[str, Any]], inputs: dict[str, str], quoted: bytes = b"") -> None:
        """Write the records of one night; `quoted` is in the journal of ingest, as the samples of a table do."""
        journal = self.store(json.dumps({"kind": "start", "inputs": inputs}).encode() + b"\n" + quoted)
        tables = self.folder({"preferences.parquet": parquet(rows), "sources.json": b"{}"})
        self.record("ingest", {}, {"data/tables": tables, "runs/ingest/journal.jsonl": journal})
        valid = self.folder({"preferences.parquet": parquet(rows), "sft.parquet": parquet([{"id": 0}])})
        aside = self.folder({"preferences.parquet": parquet(rows[:1])})
        self.record("validate", {"data/tables": tables}, {"data/valid": valid, "data/quarantine": aside})
        self.record("sft", {"data/valid/sft.parquet": md5(parquet([{"id": 0}]))}, {"models/sft": md5(b"sft")})
        pairs, weights = md5(parquet(rows)), self.folder({"model.safetensors": f"dpo {len(rows)}".encode()})
        align = {"data/valid/preferences.parquet": pairs, "models/sft": md5(b"sft")}
        self.record("align --algorithm dpo --seed 0", align, {"models/align/dpo-0": weights})
        metrics = self.store(
            json.dumps({"accuracy": len(rows) / 4, "accuracy_low": 0.1, "accuracy_high": 0.9}).encode()
        )
        self.record(
            "evaluate --algorithm dpo --seed 0",
            {"models/align/dpo-0": weights},
            {"runs/evaluate/dpo-0/metrics.json": metrics},
        )
        (self.root / "data/valid").mkdir(parents=True, exist_ok=True)
        (self.root / "data/valid/preferences.parquet").write_bytes(parquet(rows))


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    found = Nights(tmp_path)
    found.night(FIRST, {"raw/pairs/one.jsonl": "aa"})
    new = hashlib.sha256(NEW).hexdigest()
    found.night(SECOND, {"raw/pairs/one.jsonl": "aa", "data/raw/accepted/preferences/0001-new.jsonl": new})
    YAML().dump({"stages": found.locked}, tmp_path / "dvc.lock")
    monkeypatch.chdir(tmp_path)
    return found


def weights(nights: Nights, count: int) -> Artifact:
    return Artifact("models/align/dpo-0", nights.folder({"model.safetensors": f"dpo {count}".encode()}))


def test_a_model_that_newer_runs_replaced_still_leads_to_its_own_tables(nights: Nights) -> None:
    lineage = Lineage.read(nights.root)
    old, new = (describe_model(lineage, weights(nights, count)) for count in (1, 2))
    stages = ["align --algorithm dpo --seed 0", "validate", "sft", "ingest"]
    assert [entry["stage"] for entry in old["stages"]] == stages
    tables = {entry["path"]: (entry["md5"], entry["rows"]) for entry in old["tables"]}
    assert tables["data/valid/preferences.parquet"] == (md5(parquet(FIRST)), 1)
    assert {entry["path"]: entry["rows"] for entry in new["tables"]}["data/valid/preferences.parquet"] == 2
    assert old["files"] == {"raw/pairs/one.jsonl": "aa"}
    assert new["files"].keys() == {"raw/pairs/one.jsonl", "data/raw/accepted/preferences/0001-new.jsonl"}
    assert new["set_aside"] == {"preferences": 1}
    assert (old["evaluation"]["accuracy"], new["evaluation"]["accuracy"]) == (0.25, 0.5)


def test_a_stage_comes_with_its_parameters_and_the_commit_of_the_run(nights: Nights, empty_store: Path) -> None:
    start = {"kind": "start", "run": "sft-1", "stage": "sft", "arguments": {}}
    values = {"sft.optimizer.learning_rate": 0.5, "sft.samples_every": 9, "sft.lora": None}
    lines = [start, {"kind": "params", "values": values}]
    journal = nights.store("\n".join(map(json.dumps, lines)).encode())
    table = {"data/valid/sft.parquet": md5(parquet([{"id": 0}]))}
    nights.record("sft", table, {"models/sft": md5(b"new sft"), "runs/sft/journal.jsonl": journal})
    model = Artifact("models/sft", md5(b"new sft"))

    def shown() -> str:
        return command.model_text(describe_model(Lineage.read(nights.root), model), None)

    assert "made by:\n  sft  commit not recorded here\n" in shown()
    assert "parameters of sft:\n  optimizer.learning_rate = 0.5\n" in shown()
    assert "samples_every" not in shown()
    shutil.copy(empty_store, nights.root / "mlflow.db")
    client = open_client(nights.root)
    run = client.create_run("0", tags={RUN_TAG: "sft-1", COMMIT_TAG: "c" * 40}).info.run_id
    assert f"made by:\n  sft  commit {'c' * 40}\n" in shown()
    client.delete_run(run)
    assert "sft  commit not recorded here" in shown()
    measured = nights.root / ".posttrain/runs/sft-1/measurements.jsonl"
    measured.parent.mkdir(parents=True)
    starts = [{"kind": "start", "time": 1.0, "commit": commit} for commit in ("a" * 40, "b" * 40, None)]
    measured.write_text("".join(map(encode, starts)))
    assert f"made by:\n  sft  commit {'b' * 40}\n" in shown(), "the newest start that recorded one"
    found = describe_model(Lineage.read(nights.root), model)["stages"][0]
    assert (found["commit"], found["used"]["optimizer.learning_rate"]) == ("b" * 40, 0.5)


def test_a_run_that_was_made_again_keeps_the_commit_of_the_first(nights: Nights, empty_store: Path) -> None:
    measured = nights.root / ".posttrain/runs/sft-1/measurements.jsonl"
    measured.parent.mkdir(parents=True)
    measured.write_text(encode({"kind": "start", "time": 5.0, "commit": "b" * 40}))
    shutil.copy(empty_store, nights.root / "mlflow.db")
    client = open_client(nights.root)
    assert commit_of(nights.root, "sft-1") == "b" * 40

    def tracked(start: int, commit: str, status: str) -> str | None:
        run = client.create_run("0", start_time=start, tags={RUN_TAG: "sft-1", COMMIT_TAG: commit * 40}).info.run_id
        client.set_terminated(run, status)
        return commit_of(nights.root, "sft-1")

    assert tracked(5000, "b", "FINISHED") == "b" * 40
    assert tracked(3000, "a", "FINISHED") == "a" * 40
    assert tracked(1000, "c", "FAILED") == "a" * 40, "a run that failed made nothing"
    measured.unlink()
    assert commit_of(nights.root, "sft-1") == "a" * 40


def test_the_first_line_of_a_version_has_no_gap_for_a_missing_decision(nights: Nights) -> None:
    found = describe_model(Lineage.read(nights.root), weights(nights, 2))

    def first(**tags: str) -> str:
        return command.model_text(found, Version(3, {"model": "dpo-0", **tags}, ("challenger",))).split("\n")[0]

    assert first() == "version 3 (dpo-0), challenger"
    assert first(reason="best of 8") == "version 3 (dpo-0), challenger: best of 8"
    assert first(decision="passed", reason="better") == "version 3 (dpo-0), challenger: passed, better"


def test_tables_that_the_cache_has_lost_are_not_taken_for_unread(nights: Nights) -> None:
    for path in (nights.root / ".dvc/cache/files/md5").rglob("*.dir"):
        path.unlink()
    with pytest.raises(DataError, match="DVC's cache does not know its tables any more"):
        Lineage.read(nights.root).tables_with_file(hashlib.sha256(NEW).hexdigest())


def test_people_who_judged_are_named_while_their_file_is_there(nights: Nights) -> None:
    path = Path("data/raw/accepted/preferences/0002-label.jsonl")
    path.parent.mkdir(parents=True)
    rows = [{"prompt": "a", "chosen": "1", "rejected": "0", "annotator": who} for who in ("ann", "bob", "ann")]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert command.annotators({str(path): digest, "gone.jsonl": "00"}) == {str(path): {"ann": 2, "bob": 1}}
    assert command.annotators({str(path): "changed"}) == {}
    found = describe_model(Lineage.read(nights.root), weights(nights, 2)) | {
        "annotators": command.annotators({str(path): digest})
    }
    assert f"judged by:\n  {path}: ann 2, bob 1" in command.model_text(found, None)


def test_entries_are_parsed_once_and_new_ones_are_seen(nights: Nights) -> None:
    before = read_records(nights.root)
    kept = nights.root / PARSED
    assert len(json.loads(kept.read_text())) == nights.count
    stamp = kept.stat().st_mtime_ns
    assert read_records(nights.root) == before
    assert kept.stat().st_mtime_ns == stamp
    nights.night(FIRST, {"raw/pairs/two.jsonl": "bb"})
    assert len(read_records(nights.root)) > len(before)
    kept.write_text("torn {")
    again = read_records(nights.root)
    kept.unlink()
    assert read_records(nights.root) == again


def test_a_file_leads_to_the_models_that_saw_it_and_to_no_other(nights: Nights) -> None:
    lineage = Lineage.read(nights.root)
    found = affected(lineage, lineage.tables_with_file(hashlib.sha256(NEW).hexdigest()))
    assert found["tables"] == [{"path": "data/valid/preferences.parquet", "md5": md5(parquet(SECOND))}]
    assert found["models"] == [weights(nights, 2)._asdict()]
    both = affected(lineage, lineage.tables_with_file("aa"))["models"]
    assert both == sorted((weights(nights, n)._asdict() for n in (1, 2)), key=lambda model: model["md5"])
    with pytest.raises(DataError, match="no recorded run read a file with these bytes"):
        lineage.tables_with_file("00")


def test_a_row_is_found_in_every_version_at_whatever_place(nights: Nights) -> None:
    lineage = Lineage.read(nights.root)
    assert len(versions_with_row(lineage, "preferences", 1)) == 2  # id 0 on the first night
    assert versions_with_row(lineage, "preferences", 0) == [
        Artifact("data/valid/preferences.parquet", md5(parquet(SECOND)))
    ]
    with pytest.raises(DataError, match="has no row with id 7"):
        versions_with_row(lineage, "preferences", 7)
    with pytest.raises(DataError, match="validated tables: preferences"):
        versions_with_row(lineage, "pairs", 0)


def test_tables_that_the_cache_lost_are_said_to_be_unknown(nights: Nights) -> None:
    for count in (1, 2):
        path = nights.root / ".dvc/cache/files/md5" / md5(parquet([FIRST, SECOND][count - 1]))[:2]
        for file in path.iterdir():
            file.unlink()
    found = describe_model(Lineage.read(nights.root), weights(nights, 2))
    assert "? rows (not in the cache)" in command.model_text(found, None)


def test_the_command_prints_it_and_refuses_what_does_not_exist(
    nights: Nights, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (nights.root / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    monkeypatch.setattr(command.environment, "root", lambda: nights.root)
    assert command.main(["dpo-0"]) == 0
    shown = capsys.readouterr().out
    assert "data/raw/accepted/preferences/0001-new.jsonl  sha256" in shown
    assert "greedy accuracy 0.500, 95 % interval 0.100 to 0.900" in shown
    assert command.main(["--row", "preferences:0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == [weights(nights, 2)._asdict()]
    assert command.main(["grpo-0"]) == 2
    assert (
        "knows a model 'grpo-0'; did you mean 'dpo-0'? Valid: challenger, champion, dpo-0," in capsys.readouterr().err
    )
    assert command.main(["--file", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl: no such file" in capsys.readouterr().err
    (nights.root / "dvc.lock").write_text("")
    with pytest.raises(TrackingError, match="holds no stages"):
        Lineage.read(nights.root)

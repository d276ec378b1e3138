"""A forgotten file leaves no copy behind: every file of the project, DVC's cache and its remote is searched for the texts."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.commands import forget as command
from pipelines.commands import lineage as lineage_command
from pipelines.lineage.erasure import plan
from pipelines.lineage.graph import Lineage
from pipelines.promotion.registry import RETRAIN, Registry
from pipelines.tracking.served import PER_FILE, ServedTraces, append_served, read_served
from pipelines.tracking.store import open_client
from posttrain.errors import DataError
from tests.pipelines.lineage.test_lineage import Nights, md5, parquet, weights
from tests.workspace import dvc

OTHER = {"id": 1, "prompt": "what is the capital?", "chosen": "a city on a river", "rejected": "no idea at all"}
TEXTS = ("who is Ann Example?", 'she asked to be "forgotten" & <left> é', "somebody else entirely")
ROW = dict(zip(("prompt", "chosen", "rejected"), TEXTS, strict=True))
FILE = Path("data/raw/accepted/preferences/0001-ann.jsonl")
OWN = ["data/raw/own.jsonl", "inbox/again.jsonl"]
"""People's own files with the texts, which stay."""


def holders(folder: Path) -> list[str]:
    """Return the files below a folder that hold one of the texts in any form; Parquet is decoded."""
    forms = {
        form.encode()
        for text in TEXTS
        for form in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], html.escape(text))
    } | {json.dumps(json.dumps(TEXTS[1]))[3:-3].encode(), repr(TEXTS[1])[1:-1].encode()}
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        if data[:4] == b"PAR1":
            data = json.dumps(pq.read_table(path).to_pylist()).encode()
        if any(form in data for form in forms):
            found.append(path.relative_to(folder).as_posix())
    return found


@pytest.fixture
def project(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    """Return two nights of which the second took Ann's file in; the remote holds everything that the cache holds."""
    nights = Nights(tmp_path / "project")
    (nights.root / FILE).parent.mkdir(parents=True)
    (nights.root / FILE).write_text(json.dumps(ROW) + "\n")
    digest = hashlib.sha256((nights.root / FILE).read_bytes()).hexdigest()
    nights.night([{**OTHER, "id": 0}], {"raw/pairs/one.jsonl": "aa"})
    nights.night(
        [{**ROW, "id": 0}, OTHER], {"raw/pairs/one.jsonl": "aa", str(FILE): digest}, json.dumps(ROW).encode() + b"\n"
    )
    (nights.root / "data/tables").mkdir(parents=True)
    (nights.root / "data/tables/preferences.parquet").write_bytes(parquet([{**ROW, "id": 0}, OTHER]))
    (nights.root / "report").mkdir()
    (nights.root / "report/index.html").write_text(f"<p>{html.escape(TEXTS[1])}</p>")
    (nights.root / "report/calls.jsonl").write_text(json.dumps({"arguments": json.dumps({"text": TEXTS[1]})}))
    (nights.root / "report/repr.txt").write_text(repr({"text": TEXTS[1]}))
    (nights.root / "report/old.json.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
    pages = parquet([{"log": f"user: {text}"} for text in TEXTS])
    (nights.root / "report/log.parquet").write_bytes(pages)
    (nights.root / "report/other.json.gz").write_bytes(gzip.compress(json.dumps(OTHER).encode()))
    (nights.root / "inbox").mkdir()
    (nights.root / "inbox/again.jsonl").write_text(json.dumps(ROW))
    shutil.copy(root / "params.yaml", nights.root)
    config = f"[core]\n    no_scm = True\n['remote \"store\"']\n    url = {tmp_path / 'remote'}\n"
    (nights.root / ".dvc/config").write_text(config)
    nights.store(
        json.dumps(ROW | {"chosen_score": 1.0}).encode()
    )  # an earlier version of the file, which no stage read
    kept = nights.root / "data/raw/own.jsonl"
    kept.write_text(json.dumps(ROW | {"own": "file"}))
    nights.store(kept.read_bytes())
    dvc(nights.root, "add", "-q", "data/raw/accepted")
    shutil.copytree(nights.root / ".dvc/cache/files", tmp_path / "remote/files")
    monkeypatch.chdir(nights.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return nights


def test_no_copy_is_left_and_the_models_are_named(project: Nights, capsys: pytest.CaptureFixture[str]) -> None:
    remote = project.root.parent / "remote"
    before, remotely = holders(project.root), holders(remote)
    assert len(remotely) == 6, (
        "the file and its earlier version, the table before and after validation (the same bytes), the journal, the quarantine, own.jsonl"
    )
    assert {str(FILE), "data/valid/preferences.parquet", "report/index.html", "inbox/again.jsonl"} < set(before)
    packed = {"report/calls.jsonl", "report/repr.txt", "report/old.json.gz", "report/log.parquet"}
    assert packed < set(before)
    others = {path for path in remote.rglob("*") if path.is_file()} - {remote / name for name in remotely}
    own = md5((project.root / "data/raw/own.jsonl").read_bytes())
    own = f"files/md5/{own[:2]}/{own[2:]}"

    assert command.main([str(FILE)]) == 0
    shown = capsys.readouterr().out
    assert "nothing was changed; add --yes to delete" in shown
    assert f"  models/align/dpo-0  md5 {weights(project, 2).md5}\n" in shown
    assert weights(project, 1).md5 not in shown
    assert holders(project.root) == before

    assert command.main([str(FILE), "--yes"]) == 0
    assert "deleted; remotes: store; versions marked: none" in capsys.readouterr().out
    assert holders(remote) == [own]
    assert holders(project.root) == [f".dvc/cache/{own}", *OWN], "a person's own file is named, not deleted"
    assert [path.name for path in Path("report").iterdir()] == ["other.json.gz"]
    assert {path for path in remote.rglob("*") if path.is_file()} == others | {remote / own}, "nothing else was deleted"
    read, record = [json.loads(line) for line in Path(".posttrain/forgotten.jsonl").read_text().splitlines()]
    assert sorted(read["inputs"]) == [str(FILE), "raw/pairs/one.jsonl"], "the files behind a journal that was deleted"
    assert record["models"] == [weights(project, 2)._asdict()]
    assert "nfiles: 0" in Path("data/raw/accepted.dvc").read_text()


def test_traces_and_logged_answers_are_deleted_too(
    project: Nights, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(empty_store, project.root / "mlflow.db")
    answer = {"kind": "served", "time": 1.8e9, "seconds": 0.1, "model": "champion", "version": "", "md5": "aa.dir"}
    other = {**answer, "id": "b-0", "request": "b", "prompt": "what else?", "completion": "nothing at all"}
    append_served(project.root, [other] * PER_FILE)
    quoting = {
        **answer,
        "id": "a-0",
        "request": "a",
        "prompt": [{"role": "user", "content": TEXTS[0]}],
        "completion": TEXTS[1],
    }
    append_served(project.root, [quoting])
    ServedTraces(project.root, "posttrain").add([quoting, other])
    reply = Path(".posttrain/judges/ab/reply.json")
    reply.parent.mkdir(parents=True)
    reply.write_text(json.dumps({"text": f"The answer {TEXTS[1]} is wrong: [[2]]"}))
    assert {"mlflow.db", ".posttrain/served/000002.jsonl", str(reply)} < set(holders(project.root))
    assert command.main([str(FILE)]) == 0
    assert "traces in MLflow, as experiment/trace: 1\n  1/tr-" in capsys.readouterr().out
    assert command.main([str(FILE), "--yes"]) == 0
    assert holders(project.root)[1:] == OWN
    assert len(read_served(project.root)) == PER_FILE
    client = open_client(project.root)
    assert [trace.info.tags["request"] for trace in client.search_traces(locations=["1"])] == ["b"]


def test_what_the_cache_lost_is_read_from_the_remote_and_deleted_there(
    project: Nights, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = project.root.parent / "remote"
    shutil.rmtree(project.root / ".dvc/cache/files/md5")
    for path in (remote / "files/md5").rglob("*"):  # the journals of ingest lead from a file to its tables
        if path.is_file() and path.read_bytes().startswith(b'{"kind": "start"'):
            kept = project.root / ".dvc/cache/files" / path.relative_to(remote / "files")
            kept.parent.mkdir(parents=True)
            shutil.copy(path, kept)
    for path in (remote / "files/md5").rglob("*.dir"):
        kept = project.root / ".dvc/cache/files" / path.relative_to(remote / "files")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)
    assert len(holders(remote)) == 6
    assert command.main([str(FILE), "--yes"]) == 0
    assert len(holders(remote)) == 1, (
        "a person's own file; the earlier version, which no stage wrote, is found in the remote"
    )
    assert f"  models/align/dpo-0  md5 {weights(project, 2).md5}\n" in capsys.readouterr().out


def test_a_file_that_nobody_read_or_whose_texts_are_everywhere_is_refused(project: Nights, tmp_path: Path) -> None:
    unread = tmp_path / "unread.jsonl"
    unread.write_text(json.dumps(ROW | {"prompt": "another"}) + "\n")
    lineage = Lineage.read(project.root)
    with pytest.raises(DataError, match="no recorded run read a file with these bytes"):
        plan(project.root, lineage, unread)
    Path("data/tables/preferences.parquet").write_bytes(
        parquet([{**ROW, "id": 0, "more": "a text that the file lacks"}])
    )
    with pytest.raises(DataError, match="every text of the file is in other rows too"):
        plan(project.root, lineage, project.root / FILE)


@pytest.mark.parametrize("ingested", [False, True])
def test_an_accepted_file_is_forgotten_before_validate_has_finished(
    project: Nights, ingested: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    new = Path("data/raw/accepted/preferences/0002-bea.jsonl")
    row = {"prompt": "what is Bea's number?", "chosen": "she gave it as 5550199", "rejected": "no idea at all"}
    row["form"] = "canonical"
    new.write_text(json.dumps(row) + "\n")
    also = new.with_name("0003-cy.jsonl")
    also.write_text(json.dumps({**row, "chosen": "he does not know"}) + "\n")
    different = {"prompt": "and Dee?", "chosen": "not known here", "rejected": "a wrong number", "form": "canonical"}
    new.with_name("0004-dee.jsonl").write_text(json.dumps(different) + "\n")
    Path("report/words.txt").write_text("the canonical form")
    Path("inbox/bea.jsonl").write_text(json.dumps(row))
    digest = hashlib.sha256(new.read_bytes()).hexdigest()
    if ingested:
        journal = project.store(json.dumps({"kind": "start", "inputs": {str(new): digest}}).encode())
        made = parquet([{**row, "id": 0}])
        tables = project.folder({"preferences.parquet": made})
        project.record("ingest", {}, {"data/tables": tables, "runs/ingest/journal.jsonl": journal})
        Path("data/tables/preferences.parquet").write_bytes(made)
    stored = [project.root / ".dvc/cache/files/md5" / md5(made)[:2] / md5(made)[2:]] if ingested else []
    assert lineage_command.main(["--file", str(new)]) == 0
    assert "no run of validate has finished on it yet" in capsys.readouterr().out
    assert command.main([str(new)]) == 0
    shown = capsys.readouterr().out
    assert f"other accepted files with the same texts, which are kept: 1\n  {also}\n" in shown
    assert "your own files with the same texts, which are kept: 1\n  inbox/bea.jsonl\n" in shown
    assert "models to train again, which are kept: none" in shown
    assert all(path.is_file() for path in stored)
    assert command.main([str(new), "--yes"]) == 0
    assert not new.exists()
    assert also.exists()
    assert Path("report/words.txt").exists(), "the mark of a file's form is no text of its rows"
    assert FILE.exists()
    assert not any(path.exists() for path in stored)
    assert Path("data/tables/preferences.parquet").exists() is not ingested


def test_a_remote_that_cannot_be_changed_stops_before_anything_local_is_deleted(
    project: Nights, capsys: pytest.CaptureFixture[str]
) -> None:
    before = holders(project.root)
    config = project.root / ".dvc/config"
    config.write_text(config.read_text().replace("url = ", "url = ssh://nobody.invalid"))
    assert command.main([str(FILE), "--yes"]) == 2
    assert "the remote store may still hold the rows" in capsys.readouterr().err
    assert holders(project.root) == before


def test_a_dvc_that_fails_is_reported_with_its_reason_after_the_versions_are_marked(
    project: Nights, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(empty_store, project.root / "mlflow.db")
    model = weights(project, 2)
    entry = {"md5": model.md5, "size": 1, "nfiles": 1}
    registry = Registry(project.root, "posttrain")
    registry.register_entry("dpo-0", model.path, entry, {}, "test")
    (project.root / "dvc.yaml").write_text("stages: [")
    assert command.main([str(FILE), "--yes"]) == 2
    said = capsys.readouterr().err
    assert "the rows are deleted, but `dvc add data/raw/accepted` failed: " in said
    assert "dvc.yaml" in said
    (version,) = registry.versions()
    assert version.tags[RETRAIN].startswith("trained on a forgotten file, sha256 ")


def test_models_and_databases_of_servers_stay_whatever_bytes_they_hold(project: Nights) -> None:
    kept = [".posttrain/models/small/tokenizer.json", ".posttrain/servers/postgres/base/1", ".posttrain/secrets/model"]
    gone = [".posttrain/report.html", ".posttrain/runs/sft-0/journal.jsonl", ".posttrain/studies/a/runs/sft/rows.json"]
    for name in (*kept, *gone, ".posttrain/studies/a/models/sft/tokenizer.json"):
        (project.root / name).parent.mkdir(parents=True, exist_ok=True)
        (project.root / name).write_text(TEXTS[0])
    assert command.main([str(FILE), "--yes"]) == 0
    assert [name for name in (*kept, *gone) if (project.root / name).exists()] == kept
    assert (project.root / ".posttrain/studies/a/models/sft/tokenizer.json").exists()

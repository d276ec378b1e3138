"""A second file is forgotten before the tables are made again, or in a clone without tables: shared texts are no copies of its rows."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from pipelines.commands import forget as command
from pipelines.lineage.other_rows import REMAINING
from tests.pipelines.lineage.test_erasure import FILE, OTHER, ROW, holders, project  # noqa: F401  (a fixture)
from tests.pipelines.lineage.test_lineage import Nights, parquet

BEA = {"prompt": "who is Bea Example?", "chosen": "a friend of Ann's", "rejected": OTHER["rejected"]}
SECOND = FILE.with_name("0002-bea.jsonl")


@pytest.fixture
def both(project: Nights) -> Nights:  # noqa: F811
    """Return a project with a third night, on which Bea's file joined; a page quotes only the text that Bea's row shares with others."""
    SECOND.write_text(json.dumps(BEA) + "\n")
    files = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (FILE, SECOND)}
    rows = [{**ROW, "id": 0}, OTHER, {**BEA, "id": 2}]
    project.night(rows, {"raw/pairs/one.jsonl": "aa"} | files, json.dumps([ROW, BEA]).encode() + b"\n")
    Path("data/tables/preferences.parquet").write_bytes(parquet(rows))
    Path("report/shared.txt").write_text(BEA["rejected"])
    Path("report/bea.txt").write_text(BEA["prompt"])
    YAML().dump({"schema": "2.0", "stages": project.locked}, project.root / "dvc.lock")
    return project


def about_bea(project: Nights) -> list[str]:  # noqa: F811
    """Return the files with one of Bea's own texts; Parquet is decoded."""
    found = []
    for path in (path for path in sorted(project.root.rglob("*")) if path.is_file()):
        data = path.read_bytes()
        shown = json.dumps(pq.read_table(path).to_pylist()).encode() if data[:4] == b"PAR1" else data
        if any(BEA[name].encode() in shown for name in ("prompt", "chosen")):
            found.append(path.relative_to(project.root).as_posix())
    return found


def test_a_second_file_takes_no_more_than_its_own_copies(both: Nights, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(FILE), "--yes"]) == 0
    assert not Path("data/tables/preferences.parquet").exists()
    assert not any(name.startswith(".posttrain") for name in holders(both.root))
    remaining = both.root / REMAINING / "preferences.parquet"
    assert [row["prompt"] for row in pq.read_table(remaining).to_pylist()] == [OTHER["prompt"], BEA["prompt"]]
    assert about_bea(both), "her rows stay until her file is forgotten, too"

    capsys.readouterr()
    assert command.main([str(SECOND), "--yes"]) == 0
    shown = capsys.readouterr().out
    assert "models to train again, which are kept: 1\n  models/align/dpo-0" in shown
    assert about_bea(both) == []
    assert Path("report/shared.txt").exists(), "a text that other rows have is no copy of hers"
    assert [row["prompt"] for row in pq.read_table(remaining).to_pylist()] == [OTHER["prompt"]]

    Path("data/tables/preferences.parquet").write_bytes(parquet([OTHER]))
    again = {"prompt": "who is Cy Example?", "chosen": "someone else", "rejected": "not known"}
    SECOND.write_text(json.dumps(again) + "\n")
    assert command.main([str(SECOND), "--yes"]) == 0
    assert not remaining.exists(), "the table is there again"


def test_a_clone_without_tables_reads_those_of_dvc_lock(both: Nights) -> None:
    shutil.rmtree("data/tables")
    assert command.main([str(SECOND), "--yes"]) == 0
    assert about_bea(both) == []
    assert Path("report/shared.txt").exists()
    assert holders(both.root), "Ann's rows are still there"

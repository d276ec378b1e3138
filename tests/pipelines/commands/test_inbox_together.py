"""Several processes at one inbox, and names under which accepted files would be lost."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path

import pytest

from pipelines.commands.intake import IntakeResult, take_in
from pipelines.config.params import load_params
from pipelines.data.inbox_folder import FolderInbox
from pipelines.data.sources import accepted_files, table_rows
from posttrain.errors import DataError
from tests.pipelines.commands.test_intake import folder, left, put, taken

__all__ = ["folder"]


def test_two_processes_at_one_inbox_mix_no_bytes_and_lose_no_row(folder: Path) -> None:
    """Both would copy files of one name to the same place, and take the other's claims for those of a dead process."""
    for table in ("sft", "problems"):
        answer = "completion" if table == "sft" else "answer"
        put(folder, f"{table}/monday.jsonl", *({"prompt": f"{table} {i}?", answer: str(i)} for i in range(300)))
    found: list[IntakeResult] = []
    start = threading.Barrier(2)

    def process() -> None:
        start.wait()
        found.extend(taken(folder))

    processes = [threading.Thread(target=process) for _ in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    assert sorted((each.file, each.outcome, each.rows) for each in found) == [
        ("problems/monday.jsonl", "accepted", 300),
        ("sft/monday.jsonl", "accepted", 300),
    ]
    prompts = [row["prompt"] for row in table_rows("sft", load_params("params.yaml").data)][-300:]
    assert prompts == [f"sft {i}?" for i in range(300)]
    assert left(folder) == []


def test_an_inbox_that_a_different_project_reads_is_left_alone_and_never_waited_for(folder: Path) -> None:
    put(folder, "problems/a.jsonl", {"prompt": "first?", "answer": "3"})
    with FolderInbox(folder / "inbox").exclusive() as held:
        assert held
        (entry,) = take_in(load_params("params.yaml"), FolderInbox(folder / "inbox"))
    assert (entry.outcome, entry.reason.split(";")[0]) == (
        "left",
        "a process of a different project is checking this inbox",
    )
    assert [each.outcome for each in taken(folder)] == ["accepted"]


@pytest.mark.parametrize(
    "name",
    [
        "sales-team-of-central-europe-" * 3 + "2026-11-30-final.jsonl.gz",
        "\U00020000" * 60 + ".JSONL.GZ",
        "a.b.jsonl.gz",
    ],
)
def test_an_accepted_file_of_any_name_is_read_afterwards(folder: Path, name: str) -> None:
    """A name that was cut at its end lost `.jsonl`: no reader knew the file, and its rows were passed over."""
    path = folder / "inbox" / "problems" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(json.dumps({"prompt": "first?", "answer": "3"}).encode()))
    assert [entry.outcome for entry in taken(folder)] == ["accepted"]
    assert table_rows("problems", load_params("params.yaml").data)[-1]["prompt"] == "first?"


def test_an_accepted_file_that_no_reader_knows_is_named_and_never_passed_over(folder: Path) -> None:
    accepted = folder / "data/raw/accepted/problems"
    accepted.mkdir(parents=True)
    (accepted / ".DS_Store").write_bytes(b"\0")
    assert accepted_files("problems") == []
    (accepted / "0001-cut.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"0001-cut\.gz: no reader knows the ending '\.gz', so its rows"):
        accepted_files("problems")

"""Nights of the inbox: files still being written, replaced or odd; none is lost, none is taken in part, none stops the others."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.commands import admission, intake
from pipelines.commands.admission import Admission
from pipelines.commands.configure import configure
from pipelines.data import bounds, inbox_folder
from pipelines.data.files import READERS
from pipelines.data.inbox_folder import claimed_files
from pipelines.data.sources import accepted_files
from posttrain.errors import ConfigError, DataError
from tests.pipelines.commands.test_intake import folder, left, put, taken
from tests.reliability.workspace import Warm, Workspace

__all__ = ["folder"]


def problem(text: str) -> dict[str, Any]:
    return {"prompt": f"{text}: 17+34?", "answer": "51"}


def accepted(number: int = -1) -> list[str]:
    return accepted_files("problems")[number].read_text(encoding="utf-8").splitlines()


def test_a_file_that_is_open_for_writing_waits_and_is_taken_whole_later(folder: Path) -> None:
    path = put(folder, "problems/copied.jsonl", problem("one"))
    with path.open("a") as writer:
        writer.write(json.dumps(problem("two")))
        writer.flush()
        (entry,) = taken(folder)
        assert (entry.outcome, entry.reason) == ("left", "it is still being written; the next run takes it")
        writer.write("\n" + json.dumps(problem("three")) + "\n")
    assert [entry.rows for entry in taken(folder)] == [3]
    assert left(folder) == []


def test_a_file_that_grows_between_two_looks_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_SETTLE_SECONDS", "600")
    path = put(folder, "problems/copied.jsonl", problem("one"))
    asked: list[float] = []

    def another_line_arrives(seconds: float) -> None:
        asked.append(seconds)
        path.write_text(path.read_text() + json.dumps(problem("two")) + "\n")

    monkeypatch.setattr(inbox_folder.time, "sleep", another_line_arrives)
    assert [entry.outcome for entry in taken(folder)] == ["left"]
    assert 500 < asked[0] <= 600
    monkeypatch.setattr(inbox_folder.time, "sleep", asked.append)
    assert [entry.rows for entry in taken(folder)] == [2]


def test_a_file_that_was_not_touched_for_long_is_taken_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_SETTLE_SECONDS", "600")
    os.utime(put(folder, "problems/old.jsonl", problem("one")), (1e9, 1e9))
    asked: list[float] = []
    monkeypatch.setattr(inbox_folder.time, "sleep", asked.append)
    assert [entry.outcome for entry in taken(folder)] == ["accepted"]
    assert asked == [0.0]


def test_a_file_from_the_future_waits_no_longer_than_a_new_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the clock back by an hour after the file was written."""
    monkeypatch.setenv("POSTTRAIN_SETTLE_SECONDS", "600")
    written = put(folder, "problems/future.jsonl", problem("one"))
    os.utime(written, (written.stat().st_mtime + 3600,) * 2)
    asked: list[float] = []
    monkeypatch.setattr(inbox_folder.time, "sleep", asked.append)
    assert [entry.outcome for entry in taken(folder)] == ["accepted"]
    assert asked == [600.0]


def test_a_corrected_file_moved_over_the_old_one_during_the_check_is_read_next_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(folder, "problems/a.jsonl", problem("old"))
    corrected = put(folder, "corrected.part", problem("corrected"))
    check = Admission.check

    def moved(self: Admission, *arguments: Any) -> int:
        if corrected.exists():
            corrected.replace(path)
        return check(self, *arguments)

    monkeypatch.setattr(Admission, "check", moved)
    assert [entry.outcome for entry in taken(folder)] == ["accepted"]
    assert accepted() == [json.dumps(problem("old"))]
    assert left(folder) == ["problems/a.jsonl"]
    assert [entry.outcome for entry in taken(folder)] == ["accepted"]
    assert accepted() == [json.dumps(problem("corrected"))]


def test_a_file_that_is_written_to_during_the_check_is_given_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(folder, "problems/a.jsonl", problem("one"))
    check = Admission.check

    def appended(self: Admission, *arguments: Any) -> int:
        if not path.exists():
            claimed = folder / "inbox" / ".claimed" / "1" / "problems" / "a.jsonl"
            claimed.write_text(claimed.read_text() + json.dumps(problem("two")) + "\n")
        return check(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Admission, "check", appended)
        (entry,) = taken(folder)
    assert (entry.outcome, entry.reason) == ("left", "it was changed while it was read; the next run takes it")
    assert accepted_files("problems") == []
    assert [entry.rows for entry in taken(folder)] == [2]


def test_links_pipes_and_odd_names_stay_with_a_line_and_stop_nothing(folder: Path) -> None:
    outside = folder / "secret.jsonl"
    outside.write_text(json.dumps(problem("secret")) + "\n")
    tables = put(folder, "problems/good.jsonl", problem("good")).parent
    (tables / "dangling.jsonl").symlink_to(folder / "nothing")
    (tables / "linked.jsonl").symlink_to(outside)
    (tables / "loop").symlink_to(".")
    (folder / "inbox" / "sft").symlink_to(tables)
    os.mkfifo(tables / "pipe.jsonl")
    here = os.getcwd()
    os.chdir(tables)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jsonl")
    os.chdir(here)
    Path(os.fsdecode(os.fsencode(tables) + b"/bad\xff.jsonl")).write_text("x")
    (tables / ("n" * 240 + ".jsonl")).write_text("not JSON\n")
    (tables / "esc\x1b[2J.jsonl").write_text("x")

    found = {entry.file: entry for entry in taken(folder)}
    assert found["problems/good.jsonl"].outcome == "accepted"
    kinds = {"dangling.jsonl": "a link", "linked.jsonl": "a link", "loop": "a link", "pipe.jsonl": "a pipe"}
    for name, kind in (kinds | {"socket.jsonl": "a socket"}).items():
        assert found[f"problems/{name}"].reason == f"it is {kind}; put the file itself here"
    assert found["sft"].outcome == "left"
    assert found["problems/bad\\udcff.jsonl"].reason == "its name is not printable UTF-8; rename it"
    assert found["problems/esc\\x1b[2J.jsonl"].outcome == "left"
    assert found["problems/" + "n" * 240 + ".jsonl"].outcome == "quarantined"
    assert (tables / "linked.jsonl").is_symlink()
    assert (folder / "inbox" / "sft").is_symlink()
    assert "secret" not in "".join(
        path.read_text() for path in (folder / "inbox" / "quarantined").rglob("*") if path.is_file()
    )


def test_a_quarantined_file_keeps_its_mode(folder: Path) -> None:
    put(folder, "problems/private.jsonl", "not JSON").chmod(0o600)
    taken(folder)
    assert (folder / "inbox" / "quarantined" / "problems" / "private.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_file_whose_reader_was_killed_is_tried_once_more_and_then_set_aside(folder: Path) -> None:
    put(folder, ".claimed/1/problems/once.jsonl", problem("once"))
    put(folder, ".claimed/2/problems/twice.jsonl", problem("twice"))
    found = {entry.file: entry for entry in taken(folder)}
    assert found["problems/once.jsonl"].outcome == "accepted"
    assert found["problems/twice.jsonl"].outcome == "quarantined"
    assert "2 processes were killed while they read this file" in found["problems/twice.jsonl"].reason
    assert taken(folder) == []


def test_whatever_a_row_does_to_its_reader_the_other_files_are_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "problems/a.jsonl", problem("bad"))
    put(folder, "problems/b.jsonl", problem("good"))
    check = Admission.check

    def refusing(self: Admission, kind: Any, rows: Any) -> int:
        if "bad" in rows[0]["prompt"]:
            raise ZeroDivisionError("of a template")
        return check(self, kind, rows)

    monkeypatch.setattr(Admission, "check", refusing)
    first, second = taken(folder)
    assert (first.outcome, first.reason) == ("quarantined", "it cannot be checked: ZeroDivisionError: of a template")
    assert second.outcome == "accepted"


def test_a_misspelt_inbox_is_refused_and_a_tilde_is_the_home_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POSTTRAIN_INBOX", str(folder / "imbox"))
    assert intake.main([]) == 2
    assert f"the inbox {folder / 'imbox'} is not a folder, so no new data would ever arrive" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("POSTTRAIN_INBOX", "~/inbox")
    put(folder, "problems/a.jsonl", problem("one"))
    assert intake.main([]) == 0
    assert "accepted problems/a.jsonl" in capsys.readouterr().out
    monkeypatch.setenv("POSTTRAIN_INBOX", str(folder / "params.yaml"))
    assert intake.main([]) == 2


def test_a_folder_of_other_files_is_no_inbox(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file of the project was moved to quarantine, and accepted files were removed as known."""
    monkeypatch.setenv("HOME", str(folder.parent / "home"))
    (folder / "data/raw/accepted/problems").mkdir(parents=True)
    (folder / "data/raw/accepted/problems/0001-a.jsonl").write_text("{}")
    (folder / "link").symlink_to("data")
    before = {*folder.rglob("*")}
    for place, words in (
        (".", "contains this project"),
        ("..", "contains this project"),
        (str(folder.parent / "home"), "contains your home folder"),
        ("data/raw/accepted", "is in data/ of this project"),
        ("link/raw", "is in data/ of this project"),
    ):
        monkeypatch.setenv("POSTTRAIN_INBOX", place)
        assert intake.main([]) == 2
        assert words in capsys.readouterr().err
    assert {*folder.rglob("*")} - before <= {folder / ".posttrain"}
    assert before <= {*folder.rglob("*")}


def test_a_settle_time_that_is_no_number_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_SETTLE_SECONDS", "soon")
    put(folder, "problems/a.jsonl", problem("one"))
    with pytest.raises(ConfigError, match="POSTTRAIN_SETTLE_SECONDS = 'soon': must be a number of seconds"):
        taken(folder)


def test_files_that_would_fill_the_memory_are_set_aside_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_INBOX_MB", "3")
    where = folder / "inbox" / "problems"
    put(folder, "problems/good.jsonl", problem("one"))
    (where / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 4_000_000))
    with pa.CompressedOutputStream(str(where / "bomb.jsonl.zst"), "zstd") as stream:
        stream.write(b" " * 4_000_000)
    (where / "big.jsonl").write_bytes(b" " * 3_000_001)
    # equal values are stored once: 40,000 rows of 100 characters in a file of about a kilobyte
    table = pa.table({name: pa.repeat(pa.scalar("x" * 100), 40_000) for name in ("prompt", "answer")})
    pq.write_table(table, where / "bomb.parquet")
    assert (where / "bomb.parquet").stat().st_size < 3_000
    read = READERS[".jsonl"]
    monkeypatch.setitem(
        READERS, ".jsonl", lambda path: read(path) if path.name == "good.jsonl" else pytest.fail("a bomb was read")
    )
    monkeypatch.setitem(READERS, ".parquet", lambda _: pytest.fail("a bomb was read"))
    found = {entry.file: entry for entry in taken(folder)}
    assert found.pop("problems/good.jsonl").outcome == "accepted"
    assert sorted(found) == [f"problems/{n}" for n in ("big.jsonl", "bomb.jsonl.gz", "bomb.jsonl.zst", "bomb.parquet")]
    for name, entry in found.items():
        assert entry.outcome == "quarantined"
        words = "3 MB. Split" if name.endswith("big.jsonl") else "3 MB or 5,000,000 rows after decompression"
        assert f"holds more than {words}" in entry.reason
        assert str(folder) not in entry.reason


def test_a_parquet_file_may_not_have_more_rows_than_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_ROWS", 3)
    path = folder / "rows.parquet"
    pq.write_table(pa.table({"a": [1, 2, 3]}), path)
    bounds.refuse_too_large(path)
    pq.write_table(pa.table({"a": [1, 2, 3, 4]}), path)
    with pytest.raises(DataError, match="3 rows after decompression"):
        bounds.refuse_too_large(path)
    path.write_bytes(b"PAR1 cut short")
    bounds.refuse_too_large(path)  # its reader names the fault
    for text in ("many", "0", "-1", "1.5"):
        monkeypatch.setenv("POSTTRAIN_INBOX_MB", text)
        with pytest.raises(ConfigError, match=f"POSTTRAIN_INBOX_MB = '{text}'"):
            taken(folder)


def test_more_rows_than_the_limit_are_refused_in_every_format(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_ROWS", 2)
    rows = [problem("one"), problem("two"), problem("three")]
    put(folder, "problems/good.jsonl", *rows[:2])
    put(folder, "problems/lines.jsonl", *rows)
    put(folder, "problems/array.json").write_text(json.dumps(rows))
    put(folder, "problems/table.csv").write_text("prompt,answer\n" + "".join(f"{n}?,{n}\n" for n in range(3)))
    found = {entry.file: entry for entry in taken(folder)}
    assert found.pop("problems/good.jsonl").outcome == "accepted"
    assert sorted(found) == ["problems/array.json", "problems/lines.jsonl", "problems/table.csv"]
    for entry in found.values():
        assert entry.outcome == "quarantined"
        assert "has 3 rows, and the inbox takes files of up to 2. Split it." in entry.reason


def test_a_small_file_that_would_fill_the_memory_is_set_aside(folder: Path, warm: Warm) -> None:
    """An empty list takes three bytes of JSON, and 64 of memory."""
    text = json.dumps(problem("one"))
    put(folder, "problems/bomb.jsonl").write_text(text[:-1] + ', "z": [' + "[]," * 4_000_000 + "0]}\n")
    put(folder, "problems/good.jsonl", *(problem(f"{number}?") for number in range(50)))
    Workspace(folder, warm).succeed("tests.pipelines.commands.tight_intake", POSTTRAIN_SETTLE_SECONDS="0")
    found = {entry["file"]: entry for entry in json.loads((folder / intake.RECORD).read_text())}
    assert found["problems/good.jsonl"]["outcome"] == "accepted"
    assert found["problems/bomb.jsonl"]["outcome"] == "quarantined"
    assert (
        "needs more than 96 MB of memory, and files of this size need much less"
        in found["problems/bomb.jsonl"]["reason"]
    )


def test_a_file_whose_reader_was_killed_is_named(folder: Path) -> None:
    assert claimed_files(str(folder / "inbox")) == []
    put(folder, ".claimed/1/problems/large.jsonl", problem("one"))
    assert claimed_files(str(folder / "inbox")) == ["problems/large.jsonl"]


def test_the_same_rows_in_other_bytes_are_known(folder: Path) -> None:
    rows = [problem("one"), problem("two"), problem("three")]
    path = put(folder, "problems/first.jsonl", *rows)
    text = path.read_text(encoding="utf-8")
    assert [entry.outcome for entry in taken(folder)] == ["accepted"]
    put(folder, "problems/line-ends.jsonl").write_bytes(text.replace("\n", "\r\n").encode())
    put(folder, "problems/spaced.jsonl", *(json.dumps(row, indent=None, separators=(" , ", " : ")) for row in rows))
    put(folder, "problems/array.json").write_text(json.dumps(rows))
    (folder / "inbox/problems/packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert [entry.outcome for entry in taken(folder)] == ["known"] * 4
    assert (left(folder), len(accepted_files("problems"))) == ([], 1)
    assert not list((folder / ".posttrain/intake").iterdir()), "copies of known files stay behind"
    put(folder, "problems/part.jsonl", rows[2], problem("four"))
    (entry,) = taken(folder)
    assert (entry.outcome, entry.rows) == ("accepted", 2)


@pytest.mark.parametrize(
    ("rule", "outcome", "aside"), [("warn", "accepted", 0), ("quarantine", "accepted", 1), ("stop", "quarantined", 0)]
)
def test_rows_that_the_table_has_are_counted_or_refused_as_validate_would(
    folder: Path, rule: str, outcome: str, aside: int
) -> None:
    configure(folder / "params.yaml", [f"validation.rules.duplicate_rows={rule}"])
    put(folder, "problems/first.jsonl", problem("one"), problem("two"))
    taken(folder)
    put(folder, "problems/second.jsonl", problem("three"), problem("one"))
    (entry,) = taken(folder)
    assert (entry.outcome, entry.set_aside) == (outcome, aside)
    assert ("1 rows are in the table problems already (first: 'one: 17+34?')" in entry.reason) == (rule == "stop")


def test_many_small_files_do_not_read_the_whole_data_for_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, digest, calls = admission.held_out, admission.file_digest, {"split": 0, "digest": 0}

    def count(name: str, call: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            calls[name] += 1
            return call(*arguments)

        return counted

    monkeypatch.setattr(admission, "held_out", count("split", split))
    monkeypatch.setattr(admission, "file_digest", count("digest", digest))
    for i in range(6):
        put(folder, f"problems/{i}.jsonl", problem(f"number {i}"))
    assert [entry.outcome for entry in taken(folder)] == ["accepted"] * 6
    assert calls == {"split": 1, "digest": 5}  # each accepted file once, when the next one is compared with it

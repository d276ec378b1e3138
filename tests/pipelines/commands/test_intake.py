"""The inbox: good files join the data, bad ones are set aside with the reason, whatever happens in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands import intake
from pipelines.commands.configure import configure
from pipelines.commands.intake import IntakeResult, take_in
from pipelines.config.params import load_params
from pipelines.data.inbox_folder import FolderInbox, open_inbox
from pipelines.data.sources import accepted_files, table_rows
from pipelines.ingest import split_tables
from pipelines.validation.leakage import shown_prompt
from posttrain.environments.parts import KINDS
from posttrain.errors import DataError
from tests.s3 import CREDENTIALS, serving

Record = dict[str, Any]
PAIR = {"chosen": "51", "rejected": "52", "chosen_score": 1.0, "rejected_score": 0.0}


@pytest.fixture
def folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with small generated tables and an empty inbox, without a base model."""
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    configure(tmp_path / "params.yaml", [str(root / "tests" / "end_to_end" / "tiny.yaml")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_INBOX", raising=False)
    monkeypatch.setenv("POSTTRAIN_SETTLE_SECONDS", "0")
    return tmp_path


def put(folder: Path, name: str, *records: Record | str) -> Path:
    path = folder / "inbox" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def taken(folder: Path) -> list[IntakeResult]:
    return take_in(load_params(folder / "params.yaml"), open_inbox(str(folder / "inbox")))


def left(folder: Path) -> list[str]:
    inbox = folder / "inbox"
    return sorted(path.relative_to(inbox).as_posix() for path in inbox.rglob("*") if path.is_file())


def test_bad_files_are_set_aside_with_their_reason_and_never_block_good_ones(folder: Path) -> None:
    put(folder, "preferences/a-broken.jsonl", '{"prompt": "1+1=", "chosen": ')
    put(folder, "preferences/b-good.jsonl", {"prompt": "what is 17+34?", **PAIR}, {"prompt": "and 5+6?", **PAIR})
    put(folder, "sft/no-completion.jsonl", {"prompt": "1+1="})
    put(folder, "sft/empty.jsonl")
    put(folder, "loose.jsonl", {"prompt": "1+1="})
    put(folder, "preference/typo.jsonl", {"prompt": "1+1=", **PAIR})
    put(folder, "sft/notes.txt", "not data")
    put(folder, "preferences/.hidden.jsonl", "x")
    put(folder, "preferences/uploading.jsonl.part", "x")

    found = {entry.file: entry for entry in taken(folder)}
    assert found["preferences/b-good.jsonl"] == IntakeResult("preferences/b-good.jsonl", "accepted", "preferences", 2)
    reasons = {name: entry.reason for name, entry in found.items() if entry.outcome == "quarantined"}
    assert len(found) == 7
    assert set(reasons) == set(found) - {"preferences/b-good.jsonl"}
    assert "line 1, column 30: not JSON" in reasons["preferences/a-broken.jsonl"]
    assert "no known format has its columns (prompt)" in reasons["sft/no-completion.jsonl"]
    assert "has no records" in reasons["sft/empty.jsonl"]
    assert "the folder says which table a file is for: sft, preferences" in reasons["loose.jsonl"]
    assert "the folder says which table" in reasons["preference/typo.jsonl"]
    assert "cannot read files that end in '.txt'" in reasons["sft/notes.txt"]

    waiting = ["preferences/.hidden.jsonl", "preferences/uploading.jsonl.part"]
    aside = [f"quarantined/{name}{end}" for name in reasons for end in ("", ".reason.txt")]
    assert left(folder) == sorted([*waiting, *aside])
    reason = folder / "inbox" / "quarantined" / "sft" / "empty.jsonl.reason.txt"
    assert reason.read_text(encoding="utf-8") == reasons["sft/empty.jsonl"] + "\n"

    rows = table_rows("preferences", load_params("params.yaml").data)
    assert [row["prompt"] for row in rows[-2:]] == ["what is 17+34?", "and 5+6?"]
    assert [row["id"] for row in rows] == list(range(82))
    assert taken(folder) == []


def test_files_are_read_in_the_order_they_came_and_equal_bytes_once(folder: Path) -> None:
    put(folder, "problems/z first.JSONL", {"prompt": "first?", "answer": 3})
    assert [entry.outcome for entry in taken(folder)] == ["accepted"]
    put(folder, "problems/a.jsonl", {"prompt": "second?", "answer": "4"})
    put(folder, "problems/copy.jsonl", {"prompt": "first?", "answer": 3})
    assert [(entry.file, entry.outcome) for entry in taken(folder)] == [
        ("problems/a.jsonl", "accepted"),
        ("problems/copy.jsonl", "known"),
    ]
    accepted = folder / "data" / "raw" / "accepted" / "problems"
    assert sorted(path.name for path in accepted.iterdir()) == ["0001-z_first.jsonl", "0002-a.jsonl"]
    rows = table_rows("problems", load_params("params.yaml").data)
    assert [(row["prompt"], row["answer"]) for row in rows[-2:]] == [("first?", "3"), ("second?", "4")]
    assert left(folder) == []


def test_prompts_of_held_out_data_are_refused_in_every_direction(folder: Path) -> None:
    data = load_params("params.yaml").data
    tables = split_tables({kind: table_rows(kind, data) for kind in KINDS}, data)
    evaluated = tables["evaluation"][0]["prompt"]
    trained = tables["sft"][0]["prompt"]
    pair = tables["preferences_heldout"][0]["prompt"]
    put(folder, "sft/a.jsonl", {"prompt": evaluated, "completion": "4"})
    put(folder, "evaluation/b.jsonl", {"prompt": trained, "answer": "4"})
    put(folder, "problems/c.jsonl", {"prompt": f" {pair}", "answer": "4"})
    found = taken(folder)
    assert [entry.outcome for entry in found] == ["quarantined"] * 3
    assert all("1 prompts would be in training and in held-out data" in entry.reason for entry in found)
    assert shown_prompt({"prompt": evaluated}) in next(entry.reason for entry in found if entry.file.startswith("sft"))


def test_rows_that_validation_sets_aside_are_counted_and_a_file_of_nothing_else_is_refused(folder: Path) -> None:
    same = {**PAIR, "rejected": "51"}
    put(folder, "preferences/a.jsonl", {"prompt": "p one", **same}, {"prompt": "p two", **PAIR})
    put(folder, "preferences/b.jsonl", {"prompt": "p three", **same})
    first, second = taken(folder)
    assert (first.outcome, first.rows, first.set_aside) == ("accepted", 2, 1)
    assert second.outcome == "quarantined"
    assert "all 1 rows were quarantined" in second.reason


def test_pairs_without_scores_do_not_join_graded_ones_nor_messages_plain_text(folder: Path) -> None:
    put(folder, "preferences/a.jsonl", {"prompt": "p", "chosen": "1", "rejected": "2"})
    put(folder, "sft/b.jsonl", {"prompt": [{"role": "user", "content": "p"}], "completion": "1"})
    reasons = [entry.reason for entry in taken(folder)]
    assert reasons == [
        "a.jsonl: has no chosen_score, which the rows of the table preferences have; make them the same",
        "b.jsonl: prompt is chat messages, and the table sft holds plain text; make them the same",
    ]


def test_killed_between_keeping_and_removing_a_file_nothing_is_taken_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "problems/a.jsonl", {"prompt": "first?", "answer": "3"})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FolderInbox, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            taken(folder)
    assert left(folder) == ["problems/a.jsonl"]
    assert [entry.outcome for entry in taken(folder)] == ["known"]
    assert len(table_rows("problems", load_params("params.yaml").data)) == 65


def test_the_command_records_what_it_did_and_an_inbox_out_of_reach_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert intake.main([]) == 0
    assert f"nothing waits in {folder / 'inbox'}" in capsys.readouterr().out
    put(folder, "problems/a.jsonl", {"prompt": "first?", "answer": "3"})
    assert intake.main([]) == 0
    (record,) = json.loads((folder / ".posttrain" / "intake.json").read_text(encoding="utf-8"))
    assert (record["file"], record["outcome"], record["rows"]) == ("problems/a.jsonl", "accepted", 1)
    (folder / "a file").write_text("x")
    put(folder, "problems/b.jsonl", {"prompt": "second?", "answer": "3"}).chmod(0o000)
    assert intake.main(["--inbox", "nowhere://bucket"]) == 2
    assert "error: the inbox nowhere://bucket cannot be used" in capsys.readouterr().err


def test_an_unknown_scheme_names_the_inbox() -> None:
    with pytest.raises(DataError, match="the inbox nowhere://bucket cannot be used"):
        open_inbox("nowhere://bucket")


@pytest.mark.servers
def test_an_inbox_in_an_s3_store_is_emptied_as_a_folder_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import boto3

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("POSTTRAIN_INBOX", "s3://data/new/records")
    with serving("data") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        assert intake.main([]) == 0
        assert "nothing waits in s3://data/new/records" in capsys.readouterr().out

        store = boto3.client("s3", endpoint_url=url)
        good, bad = json.dumps({"prompt": "first?", "answer": 3}).encode(), b'{"prompt": "second?"'
        arrived = {"new/records/problems/good.jsonl": good, "new/records/problems/bad.jsonl": bad}
        others = {"new/records/problems/late.part": good, "elsewhere/problems/x.jsonl": good}
        for key, body in (arrived | others).items():
            store.put_object(Bucket="data", Key=key, Body=body)
        assert intake.main([]) == 0
        printed = capsys.readouterr().out
        assert "intake: accepted problems/good.jsonl: 1 rows for problems" in printed
        assert "intake: quarantined problems/bad.jsonl: bad.jsonl, line 1, column 21: not JSON" in printed
        kept = folder / "data" / "raw" / "accepted" / "problems" / "0001-good.jsonl"
        assert kept.read_bytes() == good
        listed = {entry["Key"] for entry in store.list_objects_v2(Bucket="data")["Contents"]}
        bad_one = "new/records/quarantined/problems/bad.jsonl"
        assert listed == {*others, bad_one, f"{bad_one}.reason.txt"}
        assert (
            store.get_object(Bucket="data", Key=f"{bad_one}.reason.txt")["Body"].read().startswith(b"bad.jsonl, line 1")
        )
        store.put_object(Bucket="data", Key="new/records/problems/again.jsonl", Body=good)
        assert intake.main([]) == 0
        assert "known already problems/again.jsonl" in capsys.readouterr().out
    assert intake.main([]) == 2
    assert "error: the inbox s3://data/new/records cannot be used" in capsys.readouterr().err


def test_a_bad_file_of_any_name_is_set_aside_and_none_replaces_another(folder: Path) -> None:
    for day in ("monday", "tuesday"):
        put(folder, "sft/part[1]*?.jsonl", f"{day}: not JSON")
        put(folder, f"problems/{day}.jsonl", {"prompt": f"{day}: 17+34?", "answer": "51"})
        assert sorted(entry.outcome for entry in taken(folder)) == ["accepted", "quarantined"]
    aside = folder / "inbox" / "quarantined" / "sft"
    found = {path.name: path.read_text(encoding="utf-8").strip() for path in aside.glob("*.jsonl")}
    assert found == {"part[1]*?.jsonl": "monday: not JSON", "part[1]*?-2.jsonl": "tuesday: not JSON"}
    assert {path.name for path in aside.glob("*.txt")} == {f"{name}.reason.txt" for name in found}


def test_the_ten_thousandth_file_is_read_last_and_replaces_none(folder: Path) -> None:
    accepted = folder / "data" / "raw" / "accepted" / "problems"
    accepted.mkdir(parents=True)
    (accepted / "9999-data.jsonl").write_text(json.dumps({"prompt": "first: 1+1?", "answer": "2"}) + "\n")
    for name in ("second", "third"):
        put(folder, "problems/data.jsonl", {"prompt": f"{name}: 1+1?", "answer": "2"})
        assert [entry.outcome for entry in taken(folder)] == ["accepted"]
    names = [path.name for path in accepted_files("problems")]
    assert names == ["9999-data.jsonl", "10000-data.jsonl", "10001-data.jsonl"]

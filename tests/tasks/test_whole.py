"""Bytes that DVC calls up to date and that are not those of their hash: it trusts every read-only object of its cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from posttrain.errors import OrchestrationError
from tasks.dag import changed, read_dag
from tasks.remote import restore_missing
from tasks.whole import RECORD, drop_damaged
from tests.tasks.test_champion import flip
from tests.workspace import dvc

POINTER = "data/raw/accepted.dvc"


def objects(root: Path) -> dict[str, Path]:
    return {path.read_text(): path for path in (root / ".dvc/cache/files/md5").glob("??/*")}


def test_accepted_files_do_not_come_back_from_damaged_objects(workspace: Path) -> None:
    """A new clone whose cache has a flipped bit would train on other rows, and DVC would report nothing."""
    accepted = workspace / "data/raw/accepted"
    (accepted / "sft").mkdir(parents=True)
    (accepted / "sft" / "0001-a.jsonl").write_text("one")
    dvc(workspace, "add", "-q", "data/raw/accepted")
    shutil.rmtree(accepted)
    flip(objects(workspace)["one"])
    with pytest.raises(OrchestrationError, match=r"1 files of data/raw/accepted are damaged in DVC's cache"):
        restore_missing(workspace, POINTER)
    assert not accepted.exists(), "DVC would call the damaged files up to date"


def test_a_merge_conflict_of_accepted_files_names_how_both_sides_are_kept(tmp_path: Path) -> None:
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / POINTER).write_text("outs:\n<<<<<<< HEAD\n- md5: 1\n=======\n- md5: 2\n>>>>>>> theirs\n")
    with pytest.raises(OrchestrationError, match=r"holds a merge conflict.*would lose the files.*--theirs.*--ours"):
        restore_missing(tmp_path, POINTER)


def test_a_damaged_output_that_dvc_calls_up_to_date_is_made_again(finished: Path) -> None:
    dag, output = read_dag(finished), finished / "start.txt"
    assert drop_damaged(finished, dag, set()) == set()
    output.unlink()
    flip(objects(finished)["2"])
    dvc(finished, "checkout", "-q", "start")
    assert (output.read_text(), changed(finished)) == ("3", set()), "DVC sees nothing"
    assert drop_damaged(finished, dag, {"join"}) == set(), "join does not read it"
    assert drop_damaged(finished, dag, {"side@left"}) == {"start"}
    assert not output.exists()
    assert "2" not in objects(finished), "DVC would take it for the result"
    assert "start" in changed(finished)
    (finished / RECORD).write_bytes(b"\0")  # as after a power cut

    pointer, data = finished / "inbox.dvc", finished / "inbox" / "number.txt"
    assert drop_damaged(finished, dag, {"start"}) == set()
    (finished / ".dvcignore").write_text("*.swp\n")
    (data.parent / "a.swp").write_text("of an editor")
    assert drop_damaged(finished, dag, {"start"}) == set(), "DVC ignores it too"
    data.write_text("9")
    with pytest.raises(OrchestrationError, match=r"inbox has other bytes than its hash .* in inbox\.dvc"):
        drop_damaged(finished, dag, {"start"})
    assert (data.read_text(), pointer.is_file()) == ("9", True)


def test_links_whose_objects_the_cache_has_lost_are_named(finished: Path) -> None:
    """Go on although `dvc status` itself ends in an error, as with `cache.type symlink`."""
    (finished / "inbox" / "number.txt").unlink()
    (finished / "inbox" / "number.txt").symlink_to(finished / "lost")
    assert "inbox.dvc" in changed(finished)
    assert drop_damaged(finished, read_dag(finished), {"start"}) == set(), "DVC reports it"
    with pytest.raises(OrchestrationError, match=r"1 files that inbox\.dvc lists are missing .*first: number\.txt"):
        restore_missing(finished, "inbox.dvc")

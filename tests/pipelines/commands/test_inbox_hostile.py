"""Others who may write into the inbox give rows only: no path of theirs leads out of it, and no entry of theirs stops a night."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.admission import Admission
from tests.pipelines.commands.test_inbox_nights import problem
from tests.pipelines.commands.test_intake import folder, left, put, taken

__all__ = ["folder"]
NOBODY = 65534


@pytest.fixture
def outside(folder: Path) -> Path:
    """A folder of the user who runs the intake; a file of his is in it."""
    made = folder / "outside"
    for below in ("", "problems", "1/problems", "2/problems"):
        (made / below).mkdir(parents=True, exist_ok=True)
    (made / "1" / "problems" / "mine.jsonl").write_text("mine")
    return made


def files(outside: Path) -> list[str]:
    return sorted(path.relative_to(outside).as_posix() for path in outside.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "link", ["quarantined", "quarantined/problems", ".claimed", ".claimed/1", ".claimed/1/problems"]
)
def test_a_link_in_place_of_the_intakes_own_folders_leads_nowhere(folder: Path, outside: Path, link: str) -> None:
    put(folder, "problems/sitecustomize.py", "import os")
    put(folder, "problems/good.jsonl", problem("good"))
    path = folder / "inbox" / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside)
    outcomes = {entry.file: entry.outcome for entry in taken(folder) if entry.outcome != "left"}
    assert outcomes == {"problems/good.jsonl": "accepted", "problems/sitecustomize.py": "quarantined"}
    assert files(outside) == ["1/problems/mine.jsonl"]
    assert (folder / "inbox" / "quarantined" / "problems" / "sitecustomize.py").is_file()
    assert not path.is_symlink()


def test_a_folder_that_becomes_a_link_during_the_check_gets_no_file(
    folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = put(folder, "problems/sitecustomize.jsonl", problem("one")).parent
    check = Admission.check

    def attacked(self: Admission, *arguments: Any) -> int:
        tables.rename(folder / "moved")
        tables.symlink_to(outside)
        claimed = folder / "inbox/.claimed/1/problems/sitecustomize.jsonl"
        claimed.write_text(claimed.read_text() + "more")  # so that the file is given back
        return check(self, *arguments)

    monkeypatch.setattr(Admission, "check", attacked)
    (entry,) = taken(folder)
    assert (entry.outcome, entry.reason) == ("left", "it was changed while it was read; the next run takes it")
    assert files(outside) == ["1/problems/mine.jsonl"]
    assert "problems/sitecustomize.jsonl" in left(folder)


@pytest.mark.parametrize("replaced", [False, True], ids=["vanished", "replaced"])
def test_a_claimed_file_that_goes_away_or_becomes_a_link_stops_nothing(
    folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, *, replaced: bool
) -> None:
    put(folder, "problems/a.jsonl", problem("bad"))
    put(folder, "problems/b.jsonl", problem("good"))
    check = Admission.check

    def attacked(self: Admission, kind: Any, rows: Any) -> int:
        if "bad" in rows[0]["prompt"]:
            claims = folder / "inbox/.claimed"
            claims.rename(folder / "taken")
            if replaced:
                (outside / "1/problems/a.jsonl").write_text("mine too")
                claims.symlink_to(outside)
        return check(self, kind, rows)

    monkeypatch.setattr(Admission, "check", attacked)
    assert [entry.outcome for entry in taken(folder)] == ["left", "accepted"]
    assert files(outside) == ["1/problems/a.jsonl", "1/problems/mine.jsonl"][not replaced :]


def test_a_sparse_file_that_is_larger_than_the_disk_is_not_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_INBOX_MB", "1")
    os.truncate(put(folder, "problems/sparse.jsonl"), 1 << 42)
    (entry,) = taken(folder)
    assert entry.outcome == "quarantined"
    assert "sparse.jsonl: holds more than 1 MB. Split it" in entry.reason
    assert not list((folder / ".posttrain/intake").iterdir())


@pytest.fixture
def nobodys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A workspace, and this process as a user for whom modes of files count: they do not for root."""
    taken(folder)  # what is imported late is imported as the user who may read it
    if os.geteuid() != 0:
        yield folder
        return
    made = Path(tempfile.mkdtemp(dir="/tmp"))
    shutil.copytree(folder, made, dirs_exist_ok=True)
    for path in (made, *made.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    monkeypatch.chdir(made)
    os.seteuid(NOBODY)
    try:
        yield made
    finally:
        os.seteuid(0)
        shutil.rmtree(made)


def test_a_file_without_read_permission_and_folders_that_may_not_be_used_stop_nothing(nobodys: Path) -> None:
    put(nobodys, "problems/secret.jsonl", problem("secret")).chmod(0)
    put(nobodys, "problems/good.jsonl", problem("good"))
    unlistable = put(nobodys, "sft/x.jsonl", {"prompt": "a", "completion": "b"}).parent
    fixed = put(nobodys, "evaluation/y.jsonl", problem("fixed")).parent
    unlistable.chmod(0o300)
    fixed.chmod(0o500)
    try:
        found = {entry.file: (entry.outcome, entry.reason) for entry in taken(nobodys)}
    finally:
        unlistable.chmod(0o700)
        fixed.chmod(0o700)
    assert found == {
        "problems/good.jsonl": ("accepted", ""),
        "problems/secret.jsonl": (
            "quarantined", "secret.jsonl: this user may not read it; `chmod u+r` it and move it back"
        ),
        "sft": ("left", "it cannot be listed: Permission denied"),
        "evaluation/y.jsonl": (
            "left", "it cannot be moved: Permission denied; give this user the right to write in its folder"
        ),
    }  # fmt: skip

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


def taken_with(project: Path, modes: dict[Path, int]) -> dict[str, tuple[str, str]]:
    """Return outcome and reason of each entry of the inbox while folders have these modes."""
    for place, mode in modes.items():
        place.chmod(mode)
    try:
        return {entry.file: (entry.outcome, entry.reason) for entry in taken(project)}
    finally:
        for place in modes:
            place.chmod(0o700)


def test_a_file_without_read_permission_and_folders_that_may_not_be_used_stop_nothing(nobodys: Path) -> None:
    put(nobodys, "problems/secret.jsonl", problem("secret")).chmod(0)
    put(nobodys, "problems/good.jsonl", problem("good"))
    unlistable = put(nobodys, "sft/x.jsonl", {"prompt": "a", "completion": "b"}).parent
    fixed = put(nobodys, "evaluation/y.jsonl", problem("fixed")).parent
    found = taken_with(nobodys, {unlistable: 0o300, fixed: 0o500})
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


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "file", "link to a file"])
def test_an_entry_in_the_place_of_a_reason_takes_nothing_and_stops_nothing(folder: Path, kind: str) -> None:
    put(folder, "problems/bad.jsonl", {"bad": 1})
    put(folder, "problems/good.jsonl", problem("good"))
    mine = put(folder, "../mine.txt", "mine")
    aside = folder / "inbox/quarantined/problems"
    note = aside / "bad.jsonl.reason.txt"
    aside.mkdir(parents=True)
    {
        "pipe": lambda: os.mkfifo(note),
        "folder": note.mkdir,
        "link": lambda: note.symlink_to("/nowhere"),
        "file": lambda: note.write_text("an earlier reason"),
        "link to a file": lambda: note.symlink_to(mine),
    }[kind]()
    before = note.lstat()
    assert {entry.file: entry.outcome for entry in taken(folder)} == {
        "problems/bad.jsonl": "quarantined", "problems/good.jsonl": "accepted"
    }  # fmt: skip
    assert (note.lstat().st_ino, mine.read_text()) == (before.st_ino, "mine\n")
    assert (aside / "bad-2.jsonl").read_text() == '{"bad": 1}\n'
    assert "bad.jsonl" in (aside / "bad-2.jsonl.reason.txt").read_text()
    assert not (aside / "bad.jsonl").exists()


def test_a_reason_that_a_killed_process_has_written_is_used(folder: Path) -> None:
    put(folder, "problems/bad.jsonl", {"bad": 1})
    (first,) = taken(folder)
    aside = folder / "inbox/quarantined/problems"
    (aside / "bad.jsonl").rename(folder / "inbox/problems/bad.jsonl")  # killed between reason and rename
    (second,) = taken(folder)
    assert first == second
    assert sorted(path.name for path in aside.iterdir()) == ["bad.jsonl", "bad.jsonl.reason.txt"]


def test_a_path_that_is_too_long_is_left_and_the_others_are_taken(folder: Path) -> None:
    put(folder, "problems/good.jsonl", problem("good"))
    here = os.getcwd()
    os.chdir(folder / "inbox")
    try:
        while (room := 4036 - len(os.getcwd())) > 1:
            name = "d" * min(200, room - 1)
            os.mkdir(name)
            os.chdir(name)
        Path("x" * 245).write_text("{}")
    finally:
        os.chdir(here)
    found = {entry.file[:10]: (entry.outcome, entry.reason) for entry in taken(folder)}
    assert found == {
        "d" * 10: ("left", "it cannot be looked at: File name too long"),
        "problems/g": ("accepted", ""),
    }


def test_folders_that_may_not_be_entered_or_written_to_stop_nothing(nobodys: Path) -> None:
    put(nobodys, "problems/bad.jsonl", {"bad": 1})
    put(nobodys, "problems/good.jsonl", problem("good"))
    shut = put(nobodys, "sft/x.jsonl", {"prompt": "a", "completion": "b"}).parent
    aside = nobodys / "inbox/quarantined"
    aside.mkdir()
    found = taken_with(nobodys, {shut: 0o400, aside: 0o500})
    assert found["problems/good.jsonl"] == ("accepted", "")
    assert found["sft/x.jsonl"] == ("left", "it cannot be looked at: Permission denied")
    outcome, reason = found["problems/bad.jsonl"]
    assert outcome == "left"
    assert reason.startswith("it is refused, and it cannot be moved to quarantined/problems: Permission denied; give")
    assert "The reason: " in reason
    assert left(nobodys) == ["problems/bad.jsonl", "sft/x.jsonl"]


@pytest.mark.parametrize("name", ["wide.csv", "wide.jsonl", "wide.json", "twice.jsonl", "each-row-its-own.jsonl"])
def test_thousands_of_columns_are_refused_without_comparing_every_name_with_every_other(
    folder: Path, name: str
) -> None:
    names = [f"c{i}" for i in range(200_000)]
    row = ",".join(f'"{each}": 1' for each in names)
    texts = {
        "wide.csv": ",".join(names) + "\n" + ",".join("1" for _ in names),
        "wide.jsonl": f"{{{row}}}",
        "wide.json": f"[{{{row}}}]",
        # with quadratic time this line takes minutes
        "twice.jsonl": f'{{{row}, "c199999": 2}}',
        "each-row-its-own.jsonl": "\n".join(f'{{"{each}": 1}}' for each in names),
    }
    put(folder, f"problems/{name}", texts[name])
    (entry,) = taken(folder)
    assert entry.outcome == "quarantined"
    assert ("key 'c199999' occurs twice" if name.startswith("twice") else "at most 1,000 are read") in entry.reason

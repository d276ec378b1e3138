"""DVC sees the accepted files of a git clone: it pushes them, reports their changes, and `dvc gc` keeps their bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.workspace import dvc

ACCEPTED = Path("data/raw/accepted")


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A git repository with the project's own ignore files, a DVC remote, and one accepted file."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(root / name, folder)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "remote", "add", "-q", "-d", "depot", str(tmp_path / "depot"))
    (folder / ACCEPTED / "sft").mkdir(parents=True)
    (folder / ACCEPTED / "sft" / "0001-monday.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    dvc(folder, "add", "-q", str(ACCEPTED))
    return folder


def test_accepted_files_are_pushed_and_a_new_clone_pulls_them(clone: Path, tmp_path: Path) -> None:
    dvc(clone, "push", "-q")
    shutil.rmtree(clone / ".dvc" / "cache")
    shutil.rmtree(clone / ACCEPTED)
    dvc(clone, "pull", "-q")
    assert (clone / ACCEPTED / "sft" / "0001-monday.jsonl").read_text() == '{"prompt": "1+1=", "completion": "2"}\n'


def test_a_change_of_an_accepted_file_is_seen(clone: Path) -> None:
    assert json.loads(dvc(clone, "status", "--json")) == {}
    (clone / ACCEPTED / "sft" / "0002-tuesday.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}\n')
    assert list(json.loads(dvc(clone, "status", "--json"))) == [f"{ACCEPTED}.dvc"]


def test_gc_keeps_the_bytes_of_accepted_files(clone: Path) -> None:
    dvc(clone, "gc", "--workspace", "--force", "-q")
    shutil.rmtree(clone / ACCEPTED)
    dvc(clone, "checkout", "-q")
    assert [path.name for path in (clone / ACCEPTED / "sft").iterdir()] == ["0001-monday.jsonl"]


def test_git_sees_pointers_and_no_data(clone: Path) -> None:
    for name in ("tables", "valid", "quarantine"):
        (clone / "data" / name).mkdir()
        (clone / "data" / name / "sft.parquet").write_bytes(b"x")
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard", "data"],
        cwd=clone,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert sorted(listed) == ["data/raw/.gitignore", f"{ACCEPTED}.dvc"]

"""The DAG and its data in every form of a checkout: detached, worktree, submodule, an archive without git."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from posttrain.errors import OrchestrationError
from tasks.dag import changed, read_dag
from tasks.remote import restore_missing

ALL = ["inbox.dvc", "start", "side@left", "side@right", "join"]
STALE = {"start", "side@left", "side@right", "join"}


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "protocol.file.allow=always")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def committed(workspace: Path) -> Path:
    git(workspace, "add", "-A")
    git(workspace, "commit", "-qm", "all")
    return workspace


def test_a_detached_head_a_worktree_and_a_submodule_have_the_same_dag(committed: Path, tmp_path: Path) -> None:
    git(committed, "checkout", "-q", "--detach")
    assert (list(read_dag(committed)), changed(committed)) == (ALL, STALE)

    parent, worktree = tmp_path / "parent", tmp_path / "worktree"
    parent.mkdir()
    git(parent, "init", "-q")
    git(parent, "submodule", "add", "-q", str(committed), "part")
    git(committed, "worktree", "add", "-q", str(worktree))
    for made in (parent / "part", worktree):
        assert (list(read_dag(made)), changed(made)) == (ALL, STALE | {"inbox.dvc"}), "the data is not here yet"


def test_data_that_a_new_worktree_lacks_is_brought_from_the_cache_or_named(committed: Path, tmp_path: Path) -> None:
    worktree = tmp_path / "worktree"
    git(committed, "worktree", "add", "-q", str(worktree))
    with pytest.raises(
        OrchestrationError, match=rf"the data of inbox\.dvc is not in this folder.*Copy it to {worktree}"
    ):
        restore_missing(worktree, "inbox.dvc")
    (worktree / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {committed / '.dvc' / 'cache'}\n")
    restore_missing(worktree, "inbox.dvc")
    assert (worktree / "inbox" / "number.txt").read_text() == "1"
    (worktree / "inbox" / "number.txt").write_text("2")
    restore_missing(worktree, "inbox.dvc")
    assert (worktree / "inbox" / "number.txt").read_text() == "2", "data that is there is not touched"


def test_an_archive_without_git_says_what_to_type(committed: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    shutil.copytree(committed, unpacked)
    shutil.rmtree(unpacked / ".git")
    with pytest.raises(OrchestrationError, match=r"is not a git repository.*core\.no_scm true` to work without git"):
        read_dag(unpacked)
    (unpacked / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    assert (list(read_dag(unpacked)), changed(unpacked)) == (ALL, STALE)

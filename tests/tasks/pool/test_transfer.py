"""Two clones that share only a git remote and a DVC remote: one restores the other's results, and checkpoints travel."""

from __future__ import annotations

import shutil
import tarfile
import threading
from pathlib import Path

import pytest

from pipelines.tracking.lockfile import read_lock
from posttrain.errors import OrchestrationError
from tasks.dag import read_dag
from tasks.pool import checkpoints
from tasks.pool.snapshot import changed_files, committed, differing, order, read_paths
from tasks.pool.transfer import RemoteAway, opened, patiently, pull_inputs, pull_stages, push_results, push_stages
from tasks.pool.tree import NoCommit, check_out, free_tree
from tests.fleet import git
from tests.tasks.test_champion import flip
from tests.workspace import dvc, times


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A finished workspace that is committed and pushed, with a folder as DVC's remote."""
    (finished / "params.yaml").write_text("seed: 0\n")
    with (finished / ".gitignore").open("a") as file:
        file.write("/.posttrain/\n/times.jsonl\n__pycache__/\n/*.txt\n")
    dvc(finished, "remote", "add", "-q", "--default", "store", str(tmp_path / "store"))
    git(finished, "add", "-A")
    git(finished, "commit", "-qm", "first")
    git(tmp_path, "init", "-q", "--bare", "bare.git")
    git(finished, "remote", "add", "origin", str(tmp_path / "bare.git"))
    git(finished, "push", "-q", "origin", "HEAD:refs/heads/main")
    dvc(finished, "push", "-q")
    return finished


@pytest.fixture
def clone(project: Path, tmp_path: Path) -> Path:
    git(tmp_path, "clone", "-q", "--branch", "main", "bare.git", "clone")
    return tmp_path / "clone"


def test_results_of_stages_travel_by_name_and_a_lost_one_is_named(project: Path, clone: Path, tmp_path: Path) -> None:
    pull_stages(clone, ["start", "side@left"])
    assert sorted(path.name for path in clone.glob("*.txt")) == ["side-left.txt", "start.txt"]
    shutil.rmtree(tmp_path / "store")
    (project / "side-left.txt").unlink()
    pull_stages(project, ["side@left"])  # the cache still has it
    push_stages(project, ["side@left", "join"])
    pull_stages(clone, ["join"])
    assert (clone / "join.txt").read_text() == (project / "join.txt").read_text()
    shutil.rmtree(clone / ".dvc" / "cache")
    with pytest.raises(OrchestrationError, match="1 files are neither in DVC's cache nor in its remote"):
        pull_stages(clone, ["join", "start"])


def test_a_clone_runs_one_stage_from_its_inputs_and_another_restores_it(project: Path, clone: Path) -> None:
    dag, paths = read_dag(project), read_paths(project)
    (project / "params.yaml").write_text("seed: 1\n")
    commit = committed(project, paths)
    wanted = order(project, commit, dag["side@left"], paths, read_lock(project), changed_files(project))
    assert wanted.files == {"params.yaml": "seed: 1\n"}
    with free_tree(clone, 2) as tree, free_tree(clone, 2) as other:
        assert [each.name for each in (tree, other)] == ["tree-0", "tree-1"]
        with pytest.raises(OrchestrationError, match="all 2 worktrees"), free_tree(clone, 2):
            pass
        check_out(clone, tree, commit, wanted.files, wanted.lock)
        with opened(tree) as repo:
            pull_inputs(repo, "side@left")
        assert sorted(path.name for path in tree.glob("*.txt")) == ["start.txt"]
        assert (tree / "params.yaml").read_text() == "seed: 1\n"
        assert not (tree / "inbox").exists()
        dvc(tree, "repro", "--single-item", "side@left")
        push_results(tree, "side@left")
        check_out(clone, other, commit, {}, wanted.lock)
        with opened(other) as repo:
            pull_inputs(repo, "side@left")
        assert "checking out outputs" in dvc(other, "repro", "--single-item", "side@left")
        assert times(other) == {}
        assert (other / "params.yaml").read_text() == "seed: 0\n"
    flip(next(path for path in (clone / ".dvc/cache/files/md5").glob("??/*") if path.read_bytes() == b"2"))
    with free_tree(clone, 1) as third:
        check_out(clone, third, commit, wanted.files, wanted.lock)
        (third / "start.txt").unlink()
        with (
            opened(third) as repo,
            pytest.raises(OrchestrationError, match=r"start\.txt has other bytes than its hash"),
        ):
            pull_inputs(repo, "side@left")
    whole = (project / "dvc.lock").read_text()
    entry = (tree / "dvc.lock").read_text().partition("  side@left:\n")[2]
    assert f"  side@left:\n{entry}" in whole


def test_code_must_be_committed_and_known_to_the_workers_remote(project: Path, clone: Path) -> None:
    paths = read_paths(project)
    (project / "notes.md").write_text("no stage reads it")
    (project / "below").mkdir()
    with pytest.raises(OrchestrationError, match="is not the top folder of a git repository"):
        committed(project / "below", {})
    with (project / ".gitignore").open("a") as file:
        file.write("!/join.txt\n")
    git(project, "commit", "-qam", "the output join.txt is not ignored")
    committed(project, paths)
    (project / "work.py").write_text("changed")
    with pytest.raises(OrchestrationError, match=r"1 files differ from the commit .* \(first: work.py\)"):
        committed(project, paths)
    git(project, "commit", "-qam", "second")
    with free_tree(clone, 1) as tree:
        with pytest.raises(NoCommit, match="git push"):
            check_out(clone, tree, committed(project, paths), {}, "")
        git(project, "push", "-q", "origin", "HEAD:refs/heads/main")
        check_out(clone, tree, committed(project, paths), {}, "")
        assert (tree / "work.py").read_text() == "changed"
    (project / "inbox" / "number.txt").write_text("2")
    dvc(project, "add", "-q", "inbox")
    assert list(differing(project, read_dag(project)["start"], changed_files(project))) == ["inbox.dvc"]
    assert list(differing(project, read_dag(project)["join"], changed_files(project))) == []


def test_a_checkpoint_goes_to_another_clone_whole_or_not_at_all(project: Path, clone: Path) -> None:
    run = project / ".posttrain" / "runs" / "side-left-0123"
    for step in (10, 20):
        (run / "checkpoints" / "code" / f"step-{step:08d}").mkdir(parents=True)
        (run / "checkpoints" / "code" / f"step-{step:08d}" / "state.pt").write_text(f"state {step}")
    (run / "checkpoints" / "code" / "partial-00000030").mkdir()
    (run / "journal.jsonl").write_text("lines\n")
    (run / "lock").write_text("")
    found = checkpoints.newest(project, "side@left")
    assert found is not None
    assert found.step == 20
    assert checkpoints.newest(project, "side@right") is None
    name = checkpoints.upload(project, "k" * 64, found)
    assert name is not None
    assert name.startswith("20-")
    with opened(clone) as repo:
        assert checkpoints.download(repo, clone, "k" * 64, "side@right") is None  # it is another stage's
        assert checkpoints.download(repo, clone, "k" * 64, "side@left") == name
    held = clone / ".posttrain" / "runs" / "side-left-0123"
    assert sorted(path.relative_to(held).as_posix() for path in held.rglob("*") if path.is_file()) == [
        "checkpoints/code/step-00000020/state.pt",
        "journal.jsonl",
    ]
    (held / "checkpoints" / "code" / "step-00000030").mkdir()  # the clone's own is newer
    (held / "journal.jsonl").write_text("more lines\n")
    with opened(clone) as repo:
        assert checkpoints.download(repo, clone, "k" * 64, "side@left") == name
    assert (held / "journal.jsonl").read_text() == "more lines\n"
    (stored,) = (project.parent / "store").rglob("20-*.tar")
    stored.write_bytes(stored.read_bytes().replace(b"state 20", b"state 21"))
    with opened(clone) as repo:
        assert checkpoints.download(repo, clone, "k" * 64, "side@left") is None
    checkpoints.remove(project, "k" * 64)
    assert not stored.exists()


@pytest.mark.parametrize("name", ["side-left-1/../../../../x", "other/x", "/side-left-1/x", "side-left-1/link"])
def test_an_archive_that_would_write_elsewhere_is_not_unpacked(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(tmp_path / "file", "side-left-1/file")
        member = archive.gettarinfo(tmp_path / ("link" if name.endswith("link") else "file"))
        member.name = name
        archive.addfile(member, None if member.issym() else (tmp_path / "file").open("rb"))
    assert not checkpoints._unpack(tmp_path / "bad.tar", tmp_path / "tree", "side@left", 10)
    assert not (tmp_path / "tree").exists()


def test_only_a_remote_that_is_away_is_asked_again() -> None:
    asked: list[int] = []

    def act() -> int:
        asked.append(1)
        if len(asked) < 2:
            raise RuntimeError("upload") from ConnectionRefusedError("refused")
        return len(asked)

    stop = threading.Event()
    assert patiently(act, "x", 60.0, stop) == 2
    with pytest.raises(RemoteAway):
        patiently(lambda: (_ for _ in ()).throw(TimeoutError("late")), "x", 0.0, stop)
    with pytest.raises(OrchestrationError, match="no access"):
        patiently(lambda: (_ for _ in ()).throw(PermissionError("no access")), "x", 60.0, stop)

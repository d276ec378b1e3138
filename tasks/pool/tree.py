"""Git worktrees of a worker's clone: one for each stage that runs at once, all with one DVC cache."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from posttrain.errors import OrchestrationError
from posttrain.files import write_atomic
from tasks.process import child_environment

FOLDER = Path(".posttrain") / "worker"
_GIT_SECONDS = 600
_GIT = threading.Lock()
"""One git command at a time: fetches of one clone lock its references."""


class NoCommit(OrchestrationError):
    """The worker's git remote does not have the commit; a different worker of the same remote would not have it either."""


@contextmanager
def free_tree(workspace: Path, count: int) -> Iterator[Path]:
    """Yield a worktree's folder that no other stage uses. Raises OrchestrationError if all `count` are in use."""
    folder = workspace.absolute() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        with (folder / f"tree-{number}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield folder / f"tree-{number}"
            return
    raise OrchestrationError(f"all {count} worktrees of {folder} are in use; the stage is given to another worker.")


def check_out(workspace: Path, tree: Path, commit: str, files: Mapping[str, str], lock: str) -> None:
    """Bring the worktree to a commit of the clone's git remote, with the order's parameter files and dvc.lock.

    Results of earlier stages stay in the folder: DVC replaces those that differ. Raises NoCommit if the remote does not have the commit.
    """
    with _GIT:
        _fetch(workspace, commit)
        if not (tree / ".git").exists():
            shutil.rmtree(tree, ignore_errors=True)
            _git(workspace, "worktree", "prune")
            _git(workspace, "worktree", "add", "--quiet", "--force", "--detach", str(tree), commit)
        _git(tree, "checkout", "--quiet", "--force", "--detach", commit)
        _git(tree, "clean", "--quiet", "--force", "-d")  # not ignored files: .dvc files and sources of an earlier order
    for path, text in files.items():
        write_atomic(tree / path, text.encode())
    (tree / "dvc.lock").unlink(missing_ok=True)
    if lock:
        write_atomic(tree / "dvc.lock", lock.encode())
    _share_cache(workspace, tree)


def _fetch(workspace: Path, commit: str) -> None:
    """Fetch the branches of the clone's git remote, unless one of them is known to hold the commit."""
    if _on_remote_branch(workspace, commit):
        return
    _git(workspace, "fetch", "--quiet", "origin")
    if not _on_remote_branch(workspace, commit):
        raise NoCommit(
            f"no branch of the git remote `origin` of {workspace} holds the commit {commit[:12]}, and a worker runs only commits of its"
            " own remote. Type `git push`, then run again."
        )


def _on_remote_branch(workspace: Path, commit: str) -> bool:
    """Return True if a branch of the remote, as last fetched, holds the commit."""
    done = _run_git(workspace, "branch", "--remotes", "--contains", commit)
    return done.returncode == 0 and bool(done.stdout.strip())


def _share_cache(workspace: Path, tree: Path) -> None:
    """Give the worktree the clone's own DVC settings, and its cache, so that an input is fetched once."""
    own, local = workspace / ".dvc" / "config.local", tree / ".dvc" / "config.local"
    text = own.read_text(encoding="utf-8") if own.is_file() else ""
    mark = tree / ".dvc" / "tmp" / "posttrain-config"
    if local.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == text:
        return
    write_atomic(local, text.encode())
    local.chmod(0o600)  # it may hold the remote's password
    cache = _dvc(workspace, "cache", "dir").strip()
    _dvc(tree, "config", "--local", "cache.dir", os.path.normpath(workspace / cache))
    _dvc(tree, "config", "--local", "cache.type", "reflink,hardlink,copy")
    write_atomic(mark, text.encode())


def _dvc(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=folder, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OrchestrationError(f"`dvc {' '.join(arguments)}` failed in {folder}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _git(folder: Path, *arguments: str) -> str:
    """Run git and return its output. Raises OrchestrationError if it fails."""
    done = _run_git(folder, *arguments)
    if done.returncode:
        raise OrchestrationError(f"`git {' '.join(arguments)}` failed in {folder}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _run_git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = child_environment({"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"})
    command = ["git", "-c", "core.hooksPath=/dev/null", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
    )

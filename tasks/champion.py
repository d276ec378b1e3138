"""Restore the champion's weights to models/champion: DVC fetches them by the hash that the registry points at.

This module writes champion.dvc, so that `dvc pull` fetches the champion and `dvc gc --workspace` keeps it, like every other output.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipelines.promotion.registry import FILES, PATH, SIZE, Version
from posttrain.errors import OrchestrationError
from tasks.process import child_environment

FOLDER = Path("models/champion")
POINTER = Path("champion.dvc")


@task(name="restore champion", task_run_name="restore champion", cache_policy=NO_CACHE, persist_result=False)
def restore_champion(root: str, version: Version) -> Path:
    """Restore the version's weights to models/champion, from the cache or else from the remote."""
    restore(Path(root), version)
    return FOLDER


def restore(root: Path, version: Version) -> None:
    """Check the weights out of DVC's cache, or pull them. Raises OrchestrationError if neither has them."""
    text = pointer(version)
    path = root / POINTER
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    if _dvc(root, "checkout", "--quiet", "--force", str(POINTER)) is None:
        return
    error = _dvc(root, "pull", "--quiet", "--force", str(POINTER))
    if error is not None:
        raise OrchestrationError(
            f"the weights of {version.name} ({version.md5}, {version.tags.get(PATH)}) are neither in DVC's cache nor in its"
            f" remote: {error}. `dvc remote list` shows the remotes that DVC reads. Correct the remote, or promote a"
            " version whose weights exist."
        )


def pointer(version: Version) -> str:
    """Return the content of champion.dvc, as `dvc add` would write it."""
    return (
        f"outs:\n- md5: {version.md5}\n  size: {version.tags[SIZE]}\n  nfiles: {version.tags[FILES]}\n"
        f"  hash: md5\n  path: {FOLDER.as_posix()}\n"
    )


def push(root: Path) -> bool:
    """Push DVC's outputs to the default remote; return False if there is none. Raises OrchestrationError if the push fails."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "remote", "default"], cwd=root, env=child_environment(), capture_output=True
    )
    if done.returncode or not done.stdout.strip():
        return False
    error = _dvc(root, "push", "--quiet")
    if error is not None:
        raise OrchestrationError(
            f"`dvc push` failed, so no version was registered: {error}. Run again when the remote responds."
        )
    return True


def _dvc(root: Path, *arguments: str) -> str | None:
    """Run dvc; return None on success, else the error line of its output."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    done = subprocess.run(command, cwd=root, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return next(
        (line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")), lines[-1] if lines else ""
    )

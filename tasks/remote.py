"""Push DVC's outputs to the remote, and ask the remote itself whether it holds the weights of a model.

`dvc push` ends with success if a file is missing from the cache. It also trusts its own index of the remote, and so reports "up to date"
for a remote that has lost files. A version is therefore registered only after the remote has listed every file of its weights.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.garbage import library_command
from pipelines.runtime.process import killed_by
from pipelines.runtime.redaction import redact
from pipelines.tracking.content import path_md5
from pipelines.tracking.lockfile import default_remote, has_conflict
from posttrain.errors import ConfigError, OrchestrationError
from tasks.cache import damaged_objects, describe, refuse_damaged, refuse_partial
from tasks.dag import open_workspace
from tasks.process import child_environment

_MOST_REASONS = 3


def push(root: Path, folder: str, md5: str) -> bool:
    """Push DVC's outputs to the default remote, then require that it holds the weights `md5` of `folder`.

    Return False if there is no remote. Raises OrchestrationError if the push fails, if the remote cannot be asked, or if weights are
    missing from it. A file that only the remote lacks is copied from the cache.
    """
    if not has_remote(root):
        return False
    if not md5:
        raise OrchestrationError(f"{folder} is not in dvc.lock, so there are no weights to push; type `dvc repro`.")
    refuse_damaged(root, md5, folder, "no version was registered")
    error = run_dvc(root, "push")
    if error is not None:
        raise OrchestrationError(
            f"`dvc push` to {default_remote(root)} failed, so no version was registered: {error}. Correct the remote (`dvc remote list`),"
            " or wait until it responds; then run again."
        )
    copy_weights(root, folder, md5, "no version was registered")
    return True


def copy_weights(root: Path, folder: str, md5: str, consequence: str) -> bool:
    """Copy those files of the weights to the default remote that only the cache holds; return False if there is no remote.

    Raises OrchestrationError, which names the `consequence`, if the remote cannot be asked, or if a file is in neither place.
    """
    if not has_remote(root):
        return False
    refuse_damaged(root, md5, folder, consequence)  # the remote would take damaged bytes under the name of whole ones
    missing = _complete(root, md5, consequence)
    if missing:
        raise OrchestrationError(
            f"{len(missing)} files of {folder} ({md5}) are neither in DVC's cache nor in {default_remote(root)} (first: {missing[0]}), so"
            f" {consequence}: no other workspace could restore it. If the folder is whole, type `dvc commit --force"
            f" {folder}`; else `dvc repro` makes it again. Then run again."
        )
    return True


def has_remote(root: Path) -> bool:
    """Return True if DVC has a default remote, in any of its configuration files."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "remote", "default"], cwd=root, env=child_environment(), capture_output=True
    )
    return done.returncode == 0 and bool(done.stdout.strip())


def _complete(root: Path, md5: str, consequence: str) -> list[str]:
    """Copy to the remote those files of the weights that only the cache holds; return the hashes that are in neither, sorted."""
    try:
        with open_workspace(root) as repo:
            cache, remote = repo.cache.local, repo.cloud.get_remote_odb()
            members = _members(cache, remote, md5)
            absent = members - set(remote.oids_exist(sorted(members)))
            held = sorted(absent & set(cache.oids_exist(sorted(absent))))
            if held:
                remote.add([cache.oid_to_path(each) for each in held], cache.fs, held)
            return sorted(absent - set(remote.oids_exist(sorted(absent)))) if absent else []
    except OrchestrationError:
        raise
    except Exception as error:  # each kind of remote raises errors of its own
        raise OrchestrationError(
            f"{default_remote(root)} could not be asked for the weights {md5}, so {consequence}: {redact(str(error))}."
            " Correct the remote (`dvc remote list`), or wait until it responds; then run again."
        ) from error


def _members(cache: Any, remote: Any, md5: str) -> set[str]:
    """Return the hashes of an output: its own, and those of its files if it is a folder whose listing exists."""
    if not md5.endswith(".dir"):
        return {md5}
    store = next((each for each in (cache, remote) if each.exists(md5)), None)
    if store is None:
        return {md5}
    return {md5} | {str(entry["md5"]) for entry in json.loads(store.fs.cat_file(store.oid_to_path(md5)))}


def restore_missing(root: Path, pointer: str) -> None:
    """Bring back the data of a .dvc file whose path does not exist, as in a new clone or git worktree. Data that exists is not touched.

    Raises OrchestrationError if it is in neither DVC's cache nor the remote, or if only a part of a folder exists: DVC would record that
    part as the whole.
    """
    path = root / pointer
    if has_conflict(path):
        raise OrchestrationError(_both_sides(pointer))
    try:
        entries = [(path.parent / str(out["path"]), out) for out in read_yaml(path)["outs"]]
    except (ConfigError, KeyError, TypeError) as damage:
        raise OrchestrationError(
            f"{pointer} is damaged ({damage}), so the data that belong to it are unknown. Type `git checkout {pointer}`, or `dvc add"
            f" {pointer.removesuffix('.dvc')}` if the folder is as it should be."
        ) from None
    if all(out.exists() for out, _ in entries):
        for out, entry in entries:
            refuse_partial(root, pointer, out, entry)
        return
    if run_dvc(root, "checkout", pointer) is None and _is_whole(root, pointer, entries):
        return
    error = run_dvc(root, "pull", pointer)
    if error is None and not _is_whole(root, pointer, entries):
        error = "the remote's bytes are not those of their hash"
    if error is not None:
        raise OrchestrationError(
            f"the data of {pointer} is not in this folder, not in DVC's cache, and cannot be pulled: {error}. Copy it to"
            f" {entries[0][0]}, or correct the remote (`dvc remote list`); then run again."
        )


def _both_sides(pointer: str) -> str:
    """Return the words for a .dvc file with a merge conflict: either side lists files that the other one lacks."""
    folder = pointer.removesuffix(".dvc")
    return (
        f"{pointer} holds a merge conflict: both sides have changed {folder}, and to take one side would lose the files that only the other"
        f" one lists. Type `git checkout --theirs {pointer} && dvc pull {pointer}`, copy {folder} to a different place, then `git checkout"
        f" --ours {pointer} && dvc pull {pointer}`, put the copied files that are missing now back (those of the inbox into inbox/TABLE:"
        f" known ones are recognised), `dvc add {folder}`, and `git add {pointer}`."
    )


def _is_whole(root: Path, pointer: str, entries: Sequence[tuple[Path, Mapping[str, Any]]]) -> bool:
    """Return True if the outputs of a .dvc file have the bytes of their hashes; DVC trusts read-only objects of its cache.

    Other outputs are removed, because DVC would call them up to date. If there is a remote, so are their damaged objects. Raises
    OrchestrationError if there is none.
    """
    hashed = [(out, str(entry["md5"])) for out, entry in entries if entry.get("hash") == "md5"]
    wrong = [(out, md5) for out, md5 in hashed if path_md5(out) != md5]
    for out, md5 in wrong:
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        damaged = damaged_objects(root, md5)
        if not has_remote(root):
            name = out.relative_to(root).as_posix()
            raise OrchestrationError(
                describe(damaged, name, f"{name} stays missing", "restore them from a back-up of the cache")
                if damaged
                else f"{name} has other bytes after `dvc checkout` than the hash in {pointer} says, so it stays missing: restore it from a"
                " back-up."
            )
        for each in damaged:
            each.unlink()
    return not wrong


def run_dvc(root: Path, *arguments: str) -> str | None:
    """Run dvc; return None on success, else the reasons in its output. With --quiet it would not give them."""
    command = library_command("dvc", "--wait-for-lock", *arguments)
    done = subprocess.run(command, cwd=root, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ").strip() for line in lines if line.startswith("ERROR: ")]
    if not errors and (words := killed_by(done.returncode)):
        return f"dvc was ended by {words}"
    return redact("; ".join(dict.fromkeys(errors[:_MOST_REASONS])) or (lines[-1] if lines else "dvc wrote nothing"))

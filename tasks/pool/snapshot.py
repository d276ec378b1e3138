"""Collect the content of an order: the commit, the files that differ from it, and the hashes of inputs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.training.reward_record import MODEL
from posttrain.errors import OrchestrationError
from tasks.dag import Node, open_workspace
from tasks.lockfile import HEAD
from tasks.pool.order import PARAMS, StageOrder, may_differ
from tasks.pool.transfer import is_record, made_paths

IGNORED = ("dvc.lock",)
"""Differs from the commit during every flow; a worker gets the hashes that it needs."""
_FIELDS = ("hash", "md5", "size", "nfiles", "isexec")


@dataclass(frozen=True)
class StagePaths:
    """Paths of one stage, relative to the project."""

    deps: tuple[str, ...]
    outs: tuple[str, ...]


def read_paths(root: Path) -> dict[str, StagePaths]:
    """Return the paths of every stage of dvc.yaml by its name."""
    from dvc.dependency.param import ParamsDependency

    def relative(path: str) -> str:
        return Path(path).relative_to(root.absolute()).as_posix()

    with open_workspace(root) as repo:
        return {
            stage.name: StagePaths(
                tuple(relative(dep.fs_path) for dep in stage.deps if not isinstance(dep, ParamsDependency)),
                tuple(relative(out.fs_path) for out in stage.outs),
            )
            for stage in repo.index.stages
            if hasattr(stage, "name")
        }


def committed(root: Path, paths: Mapping[str, StagePaths]) -> str:
    """Return the project's commit. Raises OrchestrationError if code differs from it, or if the project is a part of a repository."""
    commit = _git(root, "rev-parse", "HEAD").strip()
    top = Path(_git(root, "rev-parse", "--show-toplevel").strip())
    if top.resolve() != root.resolve():
        raise OrchestrationError(
            f"{root.absolute()} is not the top folder of a git repository ({top} is), so workers cannot check it out. Studies and tuning"
            " run in such folders: unset POSTTRAIN_POOL for them."
        )
    inputs, results = ({path for each in paths.values() for path in getattr(each, kind)} for kind in ("deps", "outs"))
    wrong = [
        path
        for new, path in _status(root)
        if path not in IGNORED
        and not may_differ(path)
        and (not new or (is_within(path, inputs) and not is_within(path, results)))
    ]
    if wrong:
        raise OrchestrationError(
            f"{len(wrong)} files differ from the commit {commit[:12]} (first: {wrong[0]}), and workers run commits only. Type `git add -A`,"
            f" `git commit` and `git push`, or `git stash`. Only {PARAMS} and .dvc files may differ: they travel with each stage."
        )
    return commit


def is_within(path: str, folders: Collection[str]) -> bool:
    """Return True if the path is one of the paths, or in a folder that is one of them."""
    return any(path == each or path.startswith(f"{each}/") for each in folders)


def _status(root: Path) -> list[tuple[bool, str]]:
    """Return (untracked, path) of each file that differs from the commit."""
    listed = _git(root, "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all")
    return [(entry[:2] == "??", entry[3:]) for entry in listed.split("\0") if entry]


def changed_files(root: Path) -> set[str]:
    """Return the files that differ from the commit and travel with an order."""
    return {path for _, path in _status(root) if may_differ(path) and (root / path).is_file()}


def differing(root: Path, node: Node, changed: Collection[str]) -> dict[str, str]:
    """Return the text, by path, of params.yaml and of the .dvc files that the stage reads, of those in `changed`."""
    data = {above for above in node.after if above.endswith(".dvc")}
    beside = {(Path(path).parent / ".gitignore").as_posix() for path in data}
    return {
        path: (root / path).read_text(encoding="utf-8")
        for path in sorted(({PARAMS} | data | beside).intersection(changed))
    }


def order(
    root: Path,
    commit: str,
    node: Node,
    paths: Mapping[str, StagePaths],
    locked: Mapping[str, Any],
    changed: Collection[str],
) -> StageOrder:
    """Return the order for a stage whose inputs are in `locked`, the stages of dvc.lock; `changed` is that of `changed_files`."""
    return StageOrder(node.name, commit, differing(root, node, changed), inputs_of(node, paths, locked))


def inputs_of(node: Node, paths: Mapping[str, StagePaths], locked: Mapping[str, Any]) -> str:
    """Return a dvc.lock with only the hashes of the stage's inputs, of those in `locked`."""
    above = {name: locked[name] for name in (*node.after, *recorded_stages(node, paths)) if name in locked}
    deps = (*paths[node.name].deps, *([MODEL] if recorded_stages(node, paths) else []))
    return input_lock(above, deps)


def recorded_stages(node: Node, paths: Mapping[str, StagePaths]) -> list[str]:
    """Return the stage that makes the reward model if this one has a record of it: dvc.yaml does not name it as an input."""
    if not any(is_record(dep) for dep in paths[node.name].deps):
        return []
    return [name for name, each in sorted(paths.items()) if MODEL in each.outs]


def input_lock(locked: Mapping[str, Any], deps: Collection[str]) -> str:
    """Return a dvc.lock with only the outputs that make the dependencies, so that equal inputs give equal text; empty without any."""
    lines = [HEAD.rstrip("\n"), "stages:"]
    for name, stage in sorted(locked.items()):
        outs = {str(out["path"]): out for out in stage.get("outs", ())}
        made = {path for dep in deps for path in outs if made_paths(dep, [path])}
        if made:
            lines += [f"  {name}:", f"    cmd: {json.dumps(stage['cmd'])}", "    outs:"]
            lines += [line for path in sorted(made) for line in _out_lines(path, outs[path])]
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _out_lines(path: str, out: Mapping[str, Any]) -> list[str]:
    return [
        f"    - path: {json.dumps(path)}",
        *(f"      {key}: {json.dumps(out[key])}" for key in _FIELDS if key in out),
    ]


def _git(root: Path, *arguments: str) -> str:
    """Run git and return its output. Raises OrchestrationError if it fails."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OrchestrationError(
            f"`git {' '.join(arguments)}` failed: {done.stderr.strip()[-300:]}. Stages on other machines need a git repository, whose"
            " commits they fetch; unset POSTTRAIN_POOL to run them here."
        )
    return done.stdout

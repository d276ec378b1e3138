"""Read the DAG from dvc.yaml through DVC: the order of the stages is written only there."""

from __future__ import annotations

import heapq
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.tracking.lockfile import lock_problem
from posttrain.errors import OrchestrationError
from posttrain.text import nearest
from tasks.console import print_line
from tasks.lock_copy import mend_lock

_NAME = re.compile(r"[A-Za-z0-9_]+(@[A-Za-z0-9_-]+)?")
_NAME_RULE = (
    "Use letters, digits and _ in project.algorithms, and whole numbers in project.seeds of params.yaml;"
    " `posttrain configure --check` checks the file."
)
Kind = Literal["data", "import", "stage"]


CHAMPION = "champion.dvc"
"""Follows the registry and never the folder: a flow must not record a stray file in models/champion as the champion."""


@dataclass(frozen=True)
class Node:
    """One stage of dvc.yaml, or one .dvc file: `data` added by `dvc add`, or an `import`."""

    name: str
    """The address that `dvc repro` takes."""
    kind: Kind
    after: tuple[str, ...]
    """Names of the nodes whose outputs this node reads, sorted."""
    before_plan: bool = False
    """True if a flow runs the stage before it counts the stale stages, because its result decides which ones are (`meta` in dvc.yaml)."""


Dag = Mapping[str, Node]


def read_dag(root: Path) -> dict[str, Node]:
    """Return every node by its address, in an order that can run: .dvc files first, then dvc.yaml's own order."""
    with open_workspace(root) as repo:
        _refuse_names([stage.name for stage in repo.index.stages if hasattr(stage, "name")])
        graph, position = repo.index.graph, {stage: i for i, stage in enumerate(repo.index.stages)}
        nodes = [
            Node(
                _address(stage, root),
                _kind(stage),
                tuple(sorted(_address(above, root) for above in graph.successors(stage))),
                bool((getattr(stage, "meta", None) or {}).get("before_plan")),
            )
            for stage in sorted(graph.nodes, key=position.__getitem__)
            if _address(stage, root) != CHAMPION
        ]
    return in_order(nodes)


def _refuse_names(names: Iterable[str]) -> None:
    """Names of matrix stages come from params.yaml, and become folders that DVC deletes before it runs a stage."""
    wrong = next((name for name in names if not _NAME.fullmatch(name)), None)
    if wrong is not None:
        raise OrchestrationError(
            f"the stage {wrong!r} of dvc.yaml has a name that could leave the project's folders. {_NAME_RULE}"
        )


def in_order(nodes: Iterable[Node]) -> dict[str, Node]:
    """Return the nodes in topological order; among those that may run, .dvc files first, then the given order."""
    listed = list(nodes)
    rank = {node.name: (node.kind == "stage", i) for i, node in enumerate(listed)}
    by_name = {node.name: node for node in listed}
    missing = {node.name: len(node.after) for node in listed}
    below: dict[str, list[str]] = {node.name: [] for node in listed}
    for node in listed:
        for above in node.after:
            below[above].append(node.name)
    ready = [(rank[name], name) for name, count in missing.items() if count == 0]
    heapq.heapify(ready)
    ordered: dict[str, Node] = {}
    while ready:
        name = heapq.heappop(ready)[1]
        ordered[name] = by_name[name]
        for child in below[name]:
            missing[child] -= 1
            if missing[child] == 0:
                heapq.heappush(ready, (rank[child], child))
    return ordered


def needed_for(dag: Dag, targets: Collection[str]) -> dict[str, Node]:
    """Return the targets and all their dependencies; the whole DAG if there are no targets."""
    wanted = set(targets) or set(dag)
    for name in sorted(wanted - set(dag)):
        raise OrchestrationError(f"dvc.yaml has no stage {name!r}{nearest(name, dag)}")
    for name in reversed(list(dag)):
        if name in wanted:
            wanted.update(dag[name].after)
    return {name: node for name, node in dag.items() if name in wanted}


def stale(dag: Dag, changed: Collection[str]) -> set[str]:
    """Return the changed nodes and everything that depends on one of them."""
    result: set[str] = set()
    for name, node in dag.items():
        if name in changed or result.intersection(node.after):
            result.add(name)
    return result


def before_plan(dag: Dag, todo: Collection[str]) -> set[str]:
    """Return the stale stages that a flow can run before it plans: those whose own inputs are up to date."""
    return {name for name in todo if dag[name].before_plan and not set(todo).intersection(dag[name].after)}


def changed(root: Path) -> set[str]:
    """Return the addresses for which `dvc status` reports a difference.

    Call it only while no stage runs: DVC's lock is not thread-safe.
    """
    from dvc.repo import lock_repo

    with open_workspace(root) as repo, lock_repo(repo):
        stages = {_address(stage, root): stage for stage in repo.index.stages}
        return {name for name, stage in stages.items() if name != CHAMPION and _differs(stage)}


def _differs(stage: Any) -> bool:
    """Return True if `dvc status` reports a difference. With links to the cache, it fails for a link whose object is lost."""
    try:
        return bool(stage.status(check_updates=True))
    except FileNotFoundError:
        return True


def import_dvc() -> None:
    """Import the modules of DVC that reading the DAG needs, while a program waits for a different one."""
    import dvc.lock
    import dvc.output
    import dvc.repo.index
    import dvc.stage.cache  # noqa: F401


@contextmanager
def open_workspace(root: Path) -> Iterator[Any]:
    """Open the workspace in DVC; waits while a dvc process holds its lock."""
    from dvc.exceptions import DvcException
    from dvc.output import OutputIsIgnoredError
    from dvc.repo import Repo
    from dvc.scm import SCMError

    if not (root / ".dvc").is_dir():
        raise OrchestrationError(
            f"{root.absolute()} is not a DVC workspace. Run the command in the project's root, or run `dvc init` there."
        )
    mend_rwlock(root)
    mend_lock(root)
    damaged = lock_problem(root)
    if damaged is not None:
        raise OrchestrationError(damaged)
    try:
        with Repo(str(root), _wait_for_lock=True) as repo:
            _refuse_versioned_remote(repo.config)
            yield repo
    except SCMError as error:
        raise OrchestrationError(
            f"{error}, and DVC needs one, as for a project that was unpacked from an archive. Type `git init`, or `python -m dvc config"
            " --local core.no_scm true` to work without git."
        ) from error
    except OutputIsIgnoredError as error:
        raise OrchestrationError(f"an output of dvc.yaml is no folder for outputs: {error}. {_NAME_RULE}") from error
    except DvcException as error:
        raise OrchestrationError(f"DVC cannot read the pipeline: {error}. {_how_to_read(str(error))}") from error


def _how_to_read(error: str) -> str:
    """Return what to correct, so that DVC reads the pipeline."""
    absent = re.search(r"Could not find '([\w.]+)'", error)
    if absent is None:
        return "Correct dvc.yaml; `git diff dvc.yaml` shows what changed since the last commit."
    name = absent[1]
    return f"params.yaml has no {name}, which dvc.yaml reads. Type: posttrain configure {name}=VALUE (docs/reference/params.md lists them)."


def _refuse_versioned_remote(config: Mapping[str, Any]) -> None:
    """Raise OrchestrationError if the default remote keeps versions by itself: `dvc push` would then remove hashes from dvc.lock."""
    name = config["core"].get("remote")
    remote = config["remote"].get(name, {})
    option = next((each for each in ("version_aware", "worktree") if remote.get(each)), None)
    if option is not None:
        raise OrchestrationError(
            f"the DVC remote {name!r} has {option}: true. `dvc push` would then replace the hashes of models in dvc.lock by the store's own"
            " version numbers, and versions of the registry are found by these hashes. Type `dvc remote modify --unset"
            f" {name} {option}`, or use a different default remote; the store's own versioning may stay on."
        )


def mend_rwlock(root: Path) -> None:
    """Remove .dvc/tmp/rwlock if a killed dvc left it empty or torn: DVC itself would refuse every later command.

    It names the processes at work; DVC ignores those that are dead, so an empty list is right for a torn file.
    """
    from dvc.lock import LockError, make_lock

    path = root / ".dvc" / "tmp" / "rwlock"
    if not path.is_file() or _is_json(path):
        return
    guard = make_lock(str(path.with_name("rwlock.lock")), tmp_dir=str(path.parent))
    try:
        with guard:
            if not _is_json(path):
                path.unlink()
                print_line(f"{path} was damaged, as after a kill of dvc, and is removed")
    except LockError:  # A living dvc writes it at this moment.
        return


def _is_json(path: Path) -> bool:
    """Return True if the file holds a JSON object."""
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (ValueError, OSError):
        return False


def _kind(stage: Any) -> Kind:
    """Return the kind of a DVC stage."""
    if hasattr(stage, "name"):
        return "stage"
    return "import" if stage.is_import else "data"


def _address(stage: Any, root: Path) -> str:
    """Return `stage.addressing`, but relative to `root`, whatever the current directory is."""
    path = os.path.relpath(stage.path, root.absolute())
    if not hasattr(stage, "name"):
        return path
    name: str = stage.name
    return name if path == "dvc.yaml" else f"{path}:{name}"

"""Move a stage's inputs and results between a worktree and DVC's remote, with DVC's own objects.

DVC's command copies its whole cache of runs; here only the entries of one stage are copied, because a remote may hold ten thousand.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipelines.runtime.redaction import redact
from pipelines.tracking.content import path_md5
from pipelines.training.reward_record import CODE, FOLDER
from posttrain.errors import Interrupted, OrchestrationError
from posttrain.files import replace
from tasks.dag import open_workspace

T = TypeVar("T")
_DVC = threading.Lock()
"""One thread in DVC at a time: its locks and settings belong to the process."""
RETRY_SECONDS = 2.0
_CONNECTION = ("connect", "timed out", "timeout", "unreachable", "503", "500", "slow down", "reset", "endpoint")


class RemoteAway(OrchestrationError):
    """DVC's remote did not respond for `remote_seconds`; a different worker may reach it."""


@contextmanager
def opened(tree: Path) -> Iterator[Any]:
    """Open the worktree in DVC, one thread at a time."""
    with _DVC, open_workspace(tree) as repo:
        yield repo


def patiently(act: Callable[[], T], what: str, seconds: float, stop: threading.Event) -> T:
    """Repeat `act` while the remote does not respond. Raises RemoteAway after `seconds`, and other errors of DVC at once."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return act()
        except OrchestrationError:
            raise
        except Exception as error:  # each kind of remote raises its own errors
            words = redact(" ".join(str(error).split())[:300])
            if not _away(error):
                raise OrchestrationError(f"{what} failed: {words or type(error).__name__}") from error
            if time.monotonic() > deadline:
                raise RemoteAway(
                    f"{what} failed for {seconds:.0f} s: {words}. `dvc remote list` shows the remote."
                ) from error
        if stop.wait(RETRY_SECONDS):
            raise Interrupted(f"stopped while waiting for DVC's remote: {what}")


def _away(error: BaseException) -> bool:
    """Return True if the error, or a cause of it, is one of the network."""
    seen: BaseException | None = error
    while seen is not None:
        text = f"{type(seen).__name__} {seen}".lower()
        if isinstance(seen, ConnectionError | TimeoutError) or any(word in text for word in _CONNECTION):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def pull_inputs(repo: Any, name: str) -> None:
    """Fetch the stage's inputs, also those that its record of the reward model names, and its entries in the cache of runs."""
    stage = find_stage(repo, name)
    outs = [out.fs_path for out in repo.index.outs]
    deps = [dep.fs_path for dep in stage.deps]
    _pull(repo, [path for dep in deps for path in made_paths(dep, outs)])
    recorded = [str(Path(repo.root_dir) / path) for dep in deps if is_record(dep) for path in _named(Path(dep))]
    _pull(repo, [path for each in recorded for path in made_paths(each, outs)])
    stage.save_deps()
    _require_whole([dep for dep in stage.deps if made_paths(dep.fs_path, outs) == [dep.fs_path]])
    _fetch_runs(repo, stage)


def _require_whole(deps: Collection[Any]) -> None:
    """Raise OrchestrationError if an input has other bytes than the hash that DVC took from its object's name."""
    for dep in deps:
        path, info = Path(dep.fs_path), dep.hash_info
        if info.name == "md5" and path_md5(path) != info.value:
            raise OrchestrationError(
                f"the input {dep} has other bytes than its hash {info.value}: its object in DVC's cache or remote is damaged, as after a"
                " fault of a disk, so the stage is not run. Remove the object there; `dvc push` from a project with whole bytes copies it"
                " again."
            )


def _pull(repo: Any, paths: list[str]) -> None:
    if paths:
        repo.pull(targets=paths, force=True)


def is_record(dependency: str) -> bool:
    """Return True for a record of `reward_readers`, which names the reward model if the stage reads it."""
    return f"/{FOLDER.as_posix()}/" in f"/{dependency}"


def _named(record: Path) -> list[str]:
    """Return the outputs that a record names; own code comes with the commit."""
    return sorted(json.loads(record.read_text(encoding="utf-8")).keys() - {CODE})


def find_stage(repo: Any, name: str) -> Any:
    """Return a stage of the project's own dvc.yaml. Raises OrchestrationError if there is none of this name."""
    for stage in repo.index.stages:
        if getattr(stage, "name", None) == name and Path(stage.path).parent == Path(repo.root_dir):
            return stage
    raise OrchestrationError(f"dvc.yaml of this commit has no stage {name!r}")


def made_paths(dependency: str, outs: Collection[str]) -> list[str]:
    """Return the paths that DVC must fetch for a dependency: itself if an output holds it, else the outputs below it.

    Code and parameters come with the commit.

    Example:
        >>> made_paths("/p/data/valid/sft.parquet", ["/p/data/valid", "/p/models/base"])
        ['/p/data/valid/sft.parquet']
        >>> made_paths("/p/data/raw", ["/p/data/raw/accepted"]), made_paths("/p/pipelines", ["/p/models/base"])
        (['/p/data/raw/accepted'], [])
    """
    if any(dependency == out or dependency.startswith(f"{out}/") for out in outs):
        return [dependency]
    return sorted(out for out in outs if out.startswith(f"{dependency}/"))


def _fetch_runs(repo: Any, stage: Any) -> None:
    """Fetch the runs with the stage's present inputs, and the outputs of the newest, which `dvc repro` then restores."""
    from dvc.stage.cache import _can_hash, _get_stage_hash
    from dvc.stage.loader import StageLoader

    if not _can_hash(stage):
        return
    key = _get_stage_hash(stage)
    remote = repo.cloud.get_remote_odb(None, "fetch --run-cache", hash_name="md5-dos2unix")
    source = remote.fs.join(remote.path, "runs", key[:2], key)
    if not remote.fs.exists(source):
        return
    target = Path(repo.stage_cache._get_cache_dir(key))
    target.mkdir(parents=True, exist_ok=True)
    for path in remote.fs.find(source):
        final = target / remote.fs.name(path)
        partial = final.with_name(f"{final.name}.{os.getpid()}.partial")
        remote.fs.get_file(path, str(partial))
        partial.rename(final)
    found = repo.stage_cache._load(stage)
    if found:
        StageLoader.fill_from_lock(stage, found)
        for objects in stage.get_used_objs().values():
            repo.cloud.pull(objects)


def pull_stages(root: Path, names: Collection[str]) -> None:
    """Bring the outputs of stages and .dvc files into the workspace, as dvc.lock names them.

    `dvc pull NAME …` reads dvc.yaml anew for each name, so its time grows with the square of their number.
    """
    with _locked_stages(root, names) as (repo, stages):
        for store, objects in _objects(stages).items():
            repo.cloud.pull(objects, odb=store)  # reports a file that it finds nowhere only in its log
        _require_none(_absent(repo, stages), "are neither in DVC's cache nor in its remote")
        lost = [str(out) for stage in stages for out in stage.checkout(force=True).get("failed", ())]
        if lost:
            raise OrchestrationError(f"{len(lost)} outputs could not be written (first: {lost[0]})")


def push_stages(root: Path, names: Collection[str]) -> None:
    """Copy the outputs of stages and .dvc files from DVC's cache to their remote."""
    with _locked_stages(root, names) as (repo, stages):
        own = [stage for stage in stages if not stage.is_repo_import]
        for store, objects in _objects(own, push=True).items():
            failed = repo.cloud.push(objects, odb=store).failed
            _require_none(failed, "could not be copied from DVC's cache to its remote")


@contextmanager
def _locked_stages(root: Path, names: Collection[str]) -> Iterator[tuple[Any, list[Any]]]:
    """Open the workspace, locked as by a dvc command, and yield it with those of its stages that have these names."""
    from dvc.repo import lock_repo

    with opened(root) as repo, lock_repo(repo):
        wanted, folder = set(names), Path(repo.root_dir)
        yield (
            repo,
            [
                stage
                for stage in repo.index.stages
                if (
                    Path(stage.path).relative_to(folder).as_posix() in wanted
                    or (Path(stage.path).parent == folder and getattr(stage, "name", None) in wanted)
                )
            ],
        )


def _objects(stages: Collection[Any], push: bool = False) -> dict[Any, set[Any]]:
    """Return the hashes of the stages' outputs, with those of the files in folders, by their remote; None is the default one."""
    found: dict[Any, set[Any]] = {}
    for stage in stages:
        for store, objects in stage.get_used_objs(push=push).items():
            found.setdefault(store, set()).update(objects)
    return found


def _absent(repo: Any, stages: Collection[Any]) -> list[Any]:
    """Return those hashes of the stages' outputs that the cache does not hold."""
    wanted = {each for objects in _objects(stages).values() for each in objects}
    wanted |= {out.hash_info for stage in stages for out in stage.outs if out.use_cache and out.hash_info}
    stores = {"md5-dos2unix": repo.cache.legacy}
    return [each for each in wanted if not stores.get(each.name, repo.cache.local).exists(each.value)]


def _require_none(objects: Collection[Any], words: str) -> None:
    """Raise OrchestrationError if there are objects."""
    if objects:
        first = min(str(each.obj_name or each.value) for each in objects)
        raise OrchestrationError(f"{len(objects)} files {words} (first: {first})")


def push_results(tree: Path, name: str) -> None:
    """Copy the stage's outputs, and its entries in the cache of runs, to the default remote."""
    from dvc.stage.cache import _can_hash, _get_stage_hash

    with opened(tree) as repo:
        stage = find_stage(repo, name)
        repo.push(targets=[out.fs_path for out in stage.outs])
        if not _can_hash(stage):
            return
        key = _get_stage_hash(stage)
        remote = repo.cloud.get_remote_odb(None, "push --run-cache", hash_name="md5-dos2unix")
        for path in sorted(Path(repo.stage_cache._get_cache_dir(key)).glob("*")):
            target = remote.fs.join(remote.path, "runs", key[:2], key, path.name)
            if path.suffix != ".partial" and not remote.fs.exists(target):
                put_file(remote.fs, path, target)


def put_file(fs: Any, path: Path, target: str) -> None:
    """Copy a file to a remote, where it appears whole: a store of objects does so by itself, a folder by renaming."""
    from dvc.fs import LocalFileSystem

    if not isinstance(fs, LocalFileSystem):
        fs.put_file(str(path), target)
        return
    fs.makedirs(fs.parent(target), exist_ok=True)
    partial = f"{target}.{os.getpid()}.partial"
    fs.put_file(str(path), partial)
    replace(Path(partial), Path(target))

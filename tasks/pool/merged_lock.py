"""Merge the workers' results into dvc.lock, which only the flow writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.config.yaml_files import parse_yaml
from pipelines.tracking.lockfile import read_lock
from posttrain.errors import ConfigError
from tasks.background import in_background
from tasks.dag import Dag, Node
from tasks.lockfile import lock_entries, write_entries
from tasks.pool.snapshot import StagePaths

WRITE_SECONDS = 0.5


class MergedLock:
    """dvc.lock in memory: parsing or sorting a large one takes seconds, so it is read once, and written once for many results."""

    def __init__(self, root: Path, whole: Dag) -> None:
        self._root, self._whole = root, whole
        self.stages: dict[str, Any] = dict(read_lock(root))
        """The content of each entry, by the stage's name."""
        path = root / "dvc.lock"
        self._entries = lock_entries(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._lock, self._writing, self._unwritten = threading.Lock(), threading.Lock(), threading.Event()

    @contextmanager
    def written(self) -> Iterator[None]:
        """Write dvc.lock after each result while inside, but at most a tenth of the time, and at the end.

        The next flow restores the last results of a flow that was killed.
        """
        try:
            with in_background(self._write_often):
                yield
        finally:
            self.write()

    def put(self, node: Node, entry: str, paths: StagePaths) -> None:
        """Put a stage's entry into dvc.lock. Raises ConfigError if it is not one of this stage with the inputs that were ordered."""
        above = {name: self.stages[name] for name in node.after if name in self.stages}
        content = checked_entry(node.name, entry, paths, above)
        with self._lock:
            self.stages[node.name], self._entries[node.name] = content, entry
        self._unwritten.set()

    def write(self) -> None:
        """Write dvc.lock if a result is not in it yet."""
        with self._writing:
            if self._unwritten.is_set():
                self._unwritten.clear()
                with self._lock:
                    entries = dict(self._entries)
                write_entries(self._root, entries, self._whole)

    def _write_often(self, over: threading.Event) -> None:
        pause = 0.0
        while not over.wait(max(WRITE_SECONDS, pause)):
            began = time.monotonic()
            self.write()
            pause = 10 * (time.monotonic() - began)


def checked_entry(name: str, entry: str, paths: StagePaths, locked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of an entry of dvc.lock.

    Raises ConfigError if it is a different stage's, or was made from other inputs than those that `locked` names.
    """
    tree = parse_yaml(entry, "the entry")
    if list(lock_entries(f"stages:\n{entry}")) != [name] or not isinstance(tree, dict) or list(tree) != [name]:
        raise ConfigError("it is not one entry of this stage")
    stage = tree[name]
    if not isinstance(stage, dict) or {str(out.get("path")) for out in stage.get("outs", ())} != set(paths.outs):
        raise ConfigError("its outputs are not those of dvc.yaml")
    used = {str(dep.get("path")): dep.get("md5") for dep in stage.get("deps", ())}
    ours = {str(out["path"]): out.get("md5") for each in locked.values() for out in each.get("outs", ())}
    other = [path for path, md5 in used.items() if path in ours and ours[path] != md5]
    if other or set(used) != set(paths.deps):
        raise ConfigError(f"it was made from other inputs{f' (first: {other[0]})' if other else ''}")
    return stage

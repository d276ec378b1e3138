"""Compare the files that a flow reads and did not make with the hashes that DVC knows them by.

DVC trusts read-only objects of its cache and its own index of files. So after `dvc pull` or `dvc checkout` a bit that was flipped on a disk
is in the folder, and `dvc status` reports it as up to date. Each file is hashed once, until its size, time or inode changes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.config.yaml_files import read_yaml
from pipelines.tracking.content import file_md5, path_md5
from pipelines.tracking.lockfile import read_lock
from posttrain.errors import ConfigError, OrchestrationError
from posttrain.files import files_below, read_json, write_atomic
from tasks.cache import damaged_objects, is_damaged, objects
from tasks.console import print_line
from tasks.dag import Dag, stale

RECORD = Path(".posttrain/whole.json")
"""Holds the hash of each compared path, with size, time and inode of its files."""
JUDGED = ("runs/evaluate/", "data/valid")
"""Outputs that the gate reads after the stages."""
Output = tuple[str, str, str]
"""Node, path in the project, and MD5."""


def drop_damaged(root: Path, dag: Dag, todo: Collection[str]) -> set[str]:
    """Remove damaged outputs that the stages of `todo`, or the gate, would read; return the names of the stages that must make them again.

    Their damaged objects of the cache are removed too, because DVC would take them for the result. Raises OrchestrationError for data of
    a .dvc file, which no stage can make again.
    """
    found: set[str] = set()
    while True:
        again = stale(dag, {*todo, *found})
        kept = {above for name in again for above in dag[name].after} - again
        judged = {name for name in read_lock(root).keys() & dag.keys() - again if name not in kept}
        outputs = [output for name in sorted(kept) for output in _outputs(root, name)]
        outputs += [each for name in sorted(judged) for each in _outputs(root, name) if each[1].startswith(JUDGED)]
        wrong = _damaged(root, outputs)
        if not wrong:
            return found
        for name, path, md5 in wrong:
            if dag[name].kind != "stage":
                raise OrchestrationError(_words(name, path, md5))
            print_line(f"{name:<24} runs again: {path} is damaged, and DVC calls it up to date")
            for each in damaged_objects(root, md5):
                each.unlink()
            shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()
            found.add(name)


def _outputs(root: Path, name: str) -> Iterator[Output]:
    """Yield the outputs of a stage in dvc.lock, or of a .dvc file."""
    stage = read_lock(root).get(name)
    if stage is not None:
        base, outs = Path(), stage.get("outs", ())
    else:
        base, outs = Path(name).parent, _listed(root / name)
    for out in outs:
        if out.get("hash") == "md5":  # DVC 2 hashed text without the carriage returns of its lines
            yield name, (base / str(out["path"])).as_posix(), str(out["md5"])


def _listed(pointer: Path) -> Iterable[Mapping[str, Any]]:
    """Return the outputs of a .dvc file; none if it is damaged, which DVC reports."""
    try:
        return list(read_yaml(pointer)["outs"]) if pointer.is_file() else []
    except (ConfigError, KeyError, TypeError):
        return []


def _damaged(root: Path, outputs: Iterable[Output]) -> list[Output]:
    """Return those outputs whose bytes are not those of their hash, and record the others."""
    known, wrong = _known(root), []
    before = dict(known)
    for name, path, md5 in outputs:
        try:
            entry = [md5, _stamp(root / path)]
        except FileNotFoundError:  # DVC reports it, also a link whose object is lost
            continue
        if known.get(path) == entry:
            continue
        if path_md5(root / path) == md5 or not _is_damaged(root, path, md5):
            known[path] = entry
        elif _stamp(root / path) == entry[1]:  # else a different process writes it, and DVC sees the change
            wrong.append((name, path, md5))
    if known != before:
        write_atomic(root / RECORD, json.dumps(known).encode())
    return wrong


def _is_damaged(root: Path, path: str, md5: str) -> bool:
    """Return True if a file is missing or has other bytes. Files that DVC ignores may be in a folder, and are no part of its hash."""
    if not (root / path).is_dir():
        return True
    listing = objects(root, md5)[:1]
    if not listing or not listing[0].is_file():  # it cannot be said which files belong to the folder
        return False
    if is_damaged(listing[0]):
        return True
    listed = {root / path / str(entry["relpath"]): str(entry["md5"]) for entry in read_json(listing[0], "Remove it.")}
    return any(not file.is_file() or file_md5(file) != wanted for file, wanted in listed.items())


def _words(name: str, path: str, md5: str) -> str:
    return (
        f"{path} has other bytes than its hash {md5} in {name}, and DVC calls it up to date, as after a fault of the disk of the project,"
        f" of DVC's cache or of its remote. Nothing was trained on it. Type `rm -r {path}` and run again: whole bytes are fetched from the"
        f" cache or the remote, if they have them. If {path} is right as it is, type `touch` on its files, then `dvc add {path}`."
    )


def _known(root: Path) -> dict[str, Any]:
    """Return the record; nothing if there is none, or if a power cut has damaged it."""
    try:
        found = json.loads((root / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stamp(path: Path) -> list[list[Any]]:
    """Return name, size, time and inode of each file of a path."""
    files = files_below(path) if path.is_dir() else [path]
    stats = [(file, file.stat()) for file in files]
    return [[file.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns, stat.st_ino] for file, stat in stats]

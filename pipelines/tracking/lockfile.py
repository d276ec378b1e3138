"""Read DVC's records of a run: the hashes of its outputs, and the remote that keeps them."""

from __future__ import annotations

import configparser
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pipelines.config.yaml_files import parse_written, parse_yaml, read_text
from pipelines.runtime.publish import JOURNAL
from pipelines.runtime.redaction import redact
from posttrain.errors import ConfigError, TrackingError

_CONFLICT = "<<<<<<< "


def read_lock(project: Path) -> dict[str, Any]:
    """Return the stages of dvc.lock by name, not to be changed; none if there is no file. Raises TrackingError if it is damaged."""
    path = project / "dvc.lock"
    if not path.is_file():
        return {}
    try:
        tree = _parsed(read_text(path), path)
    except ConfigError as error:
        raise _damaged(path, str(error)) from None
    stages = tree.get("stages") if isinstance(tree, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise _damaged(path, f"{path}: holds no stages")
    return stages


@lru_cache(maxsize=1)
def _parsed(text: str, path: Path) -> Any:
    """Return the tree. A follower asks once for each run and pass."""
    try:
        return parse_written(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return parse_yaml(text, path)  # slower, with the reason and the line in its error


def _damaged(path: Path, problem: str) -> TrackingError:
    """Return the error for a dvc.lock that cannot be used."""
    if has_conflict(path):
        return TrackingError(
            f"{path} holds a merge conflict, so it does not say which results are current. Take one side with `git checkout"
            " --ours dvc.lock` (or --theirs), then type `dvc repro`: results in DVC's cache are restored, not trained again."
        )
    return TrackingError(
        f"{problem} It is damaged, or being written at this moment, and is not used. If it stays so, type `git checkout"
        " dvc.lock`, or remove the file, then `dvc repro`: results in DVC's cache are restored, not trained again."
    )


def has_conflict(path: Path) -> bool:
    """Return True if git has left both sides of a merge in the file."""
    return _CONFLICT.encode() in path.read_bytes()


def lock_problem(project: Path) -> str | None:
    """Return the paragraph about a damaged dvc.lock, or None if it can be read."""
    try:
        read_lock(project)
    except TrackingError as error:
        return str(error)
    return None


def locked_outputs(project: Path, directory: str, journal: bytes) -> dict[str, str]:
    """Return the DVC hash of each output of the stage, if dvc.lock belongs to exactly this journal."""
    wanted = f"{directory}/{JOURNAL}"
    digest = hashlib.md5(journal, usedforsecurity=False).hexdigest()
    for stage in read_lock(project).values():
        outputs = {str(out["path"]): str(out.get("md5", "")) for out in stage.get("outs", ())}
        if outputs.get(wanted) == digest:
            return outputs
    return {}


def locked_output(project: Path, output: str) -> dict[str, Any] | None:
    """Return the entry of one output in dvc.lock: path, md5, size, nfiles. None if no stage has written it."""
    entries = (out for stage in read_lock(project).values() for out in stage.get("outs", ()))
    return next((dict(out) for out in entries if str(out["path"]) == output), None)


def read_dvc_config(project: Path) -> configparser.ConfigParser:
    """Return DVC's configuration of the project, the local file over the shared one. Raises ConfigError if one is damaged."""
    parser = configparser.ConfigParser(interpolation=None)
    for name in ("config", "config.local"):
        path = project / ".dvc" / name
        try:
            parser.read([path], encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            words = " ".join(str(error).split())
            raise ConfigError(
                f"{path} is damaged ({redact(words)}), so neither DVC nor this project finds cache and remote. Correct it; `git checkout"
                " .dvc/config` restores the shared file, and `dvc remote add --local` writes a new local one."
            ) from None
    return parser


def default_remote(project: Path) -> str | None:
    """Return the URL of DVC's default remote, without credentials."""
    parser = read_dvc_config(project)
    name = parser.get("core", "remote", fallback=None)
    url = parser.get(f"'remote \"{name}\"'", "url", fallback=None)
    return redact(url) if url else None

"""Read DVC's records of a run: the hashes of its outputs, and the remote that keeps them."""

from __future__ import annotations

import configparser
import hashlib
from pathlib import Path
from typing import Any

from pipelines.config.params import read_yaml
from pipelines.runtime.publish import JOURNAL
from pipelines.runtime.redaction import redact


def locked_outputs(project: Path, directory: str, journal: bytes) -> dict[str, str]:
    """Return the DVC hash of each output of the stage, if dvc.lock belongs to exactly this journal."""
    path = project / "dvc.lock"
    if not path.is_file():
        return {}
    wanted = f"{directory}/{JOURNAL}"
    digest = hashlib.md5(journal, usedforsecurity=False).hexdigest()
    stages: dict[str, Any] = (read_yaml(path) or {}).get("stages") or {}
    for stage in stages.values():
        outputs = {str(out["path"]): str(out.get("md5", "")) for out in stage.get("outs", ())}
        if outputs.get(wanted) == digest:
            return outputs
    return {}


def locked_output(project: Path, output: str) -> dict[str, Any] | None:
    """Return the entry of one output in dvc.lock: path, md5, size, nfiles. None if no stage has written it."""
    path = project / "dvc.lock"
    stages: dict[str, Any] = (read_yaml(path) or {}).get("stages") or {} if path.is_file() else {}
    entries = (out for stage in stages.values() for out in stage.get("outs", ()))
    return next((dict(out) for out in entries if str(out["path"]) == output), None)


def default_remote(project: Path) -> str | None:
    """Return the URL of DVC's default remote, without credentials."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read([project / ".dvc" / "config", project / ".dvc" / "config.local"], encoding="utf-8")
    name = parser.get("core", "remote", fallback=None)
    url = parser.get(f"'remote \"{name}\"'", "url", fallback=None)
    return redact(url) if url else None

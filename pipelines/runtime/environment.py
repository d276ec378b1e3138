"""Where the project is and how quiet its tools are. Imported before any of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_OFFLINE": "1",
}


def quiet() -> None:
    """No tool phones home or waits for the network, unless the caller's environment says otherwise."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    _reach_loopback()


def _reach_loopback() -> None:
    """Requests to servers of our own go to them, also where a proxy is set for everything else."""
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return
    for name in ("no_proxy", "NO_PROXY"):
        listed = [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()]
        os.environ[name] = ",".join(dict.fromkeys([*listed, "127.0.0.1", "localhost"]))


def root() -> Path:
    """The project's root: the nearest folder at or above the working directory that holds params.yaml."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file():
            return folder
    return here


def states(project: Path) -> Path:
    """Where live journals, measurements and checkpoints are: untracked, one folder per run identity."""
    return project / ".posttrain" / "runs"


def commit() -> str | None:
    """The checked-out git commit, or None without git or a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None

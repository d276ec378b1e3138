"""The workspace in which trials run: the project's code and parameters, with the trials as its algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.config.yaml_files import read_yaml
from pipelines.studies.workspace import Workspace, complete, make_paths_absolute
from pipelines.tuning.trials import Trial

FOLDER = Path(".posttrain/tune")


def search_workspace(root: Path, found: Sequence[Trial], seeds: Sequence[int]) -> Workspace:
    """Return the workspace of these trials. Raises ConfigError if a trial's values are not valid."""
    tree = read_yaml(root / "params.yaml")
    names = tuple(trial.name for trial in found)
    tree["project"] = {
        **tree["project"],
        "experiment": f"{tree['project']['experiment']} tuning",
        "algorithms": list(names),
        "seeds": list(seeds),
    }
    tree["algorithms"] = {trial.name: dict(trial.section) for trial in found}
    tree.pop("tune", None)
    make_paths_absolute(root, tree)
    complete(tree, "a trial of tune")
    return Workspace(root / FOLDER / "workspace", names, tree)

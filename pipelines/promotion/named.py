"""Find the weights that a user names: an alias or version number of the registry, or a model of dvc.lock."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines.promotion.local_store import read_versions
from pipelines.promotion.registry import ALIASES, CHALLENGER, CHAMPION, Registry, Version
from pipelines.tracking.lockfile import read_lock
from posttrain.errors import DataError
from posttrain.text import nearest

PRODUCTION = "models/champion"
"""Folder of the weights in production."""


@dataclass(frozen=True)
class NamedModel:
    """Weights as a path in the project and the MD5 that DVC knows them by; `version` if a registry's name was used."""

    path: str
    md5: str
    version: Version | None = None

    def folder(self, project: Path) -> Path:
        """Return the folder that holds exactly these weights. Raises DataError if the workspace holds other ones or none."""
        if self.version is not None and CHAMPION in self.version.aliases and (project / PRODUCTION).is_dir():
            return project / PRODUCTION
        if _locked(project).get(self.path) == self.md5 and (project / self.path).is_dir():
            return project / self.path
        name = self.path if self.version is None else self.version.name
        raise DataError(
            f"the weights of {name} (md5 {self.md5}) are not in {self.path}: type `dvc checkout {self.path}` or `dvc pull {self.path}`."
            " If a newer run has replaced them, check out the commit whose dvc.lock holds them."
        )


def find_model(project: Path, name: str, experiment: str) -> NamedModel:
    """Return the weights that a name means; `experiment` is the name of the registered model.

    Raises:
        DataError: there is no such model.
        TrackingError: the registry does not respond, or dvc.lock is damaged.
    """
    if name in ALIASES or name.isdigit():
        version = _registered(project, name, experiment)
        if version is None:
            if name == CHAMPION:
                raise no_champion(project, experiment)
            trained = ", ".join(_names(_locked(project)))
            raise DataError(
                f"no version is {name} yet: `make demo` registers its best model as challenger, unless no model solves the task, and"
                f" `make retrain` asks the gate for a champion. `posttrain models` lists the versions. Trained models: {trained or 'none'}."
            )
        return NamedModel(md5=version.md5, path=version.path, version=version)
    models, given = _locked(project), re.sub("^runs/", "models/", name.rstrip("/"))
    for path in (given, f"models/{given}", f"models/align/{given}"):
        if path in models:
            return NamedModel(path, models[path])
    raise DataError(
        f"neither dvc.lock nor the registry knows a model {name!r}{nearest(name, (*_names(models), *ALIASES))}"
    )


def no_champion(project: Path, experiment: str) -> DataError:
    """Return the error of a missing champion; it names the challenger if there is one. Raises TrackingError if MLflow does not respond."""
    local = read_versions(project, experiment)
    versions = Registry(project, experiment).versions() if local is None else local
    challenger = next((each for each in versions if CHALLENGER in each.aliases), None)
    trained = ", ".join(_names(_locked(project))) or "none: `make demo` trains some"
    named = (
        f"trained models: {trained}" if challenger is None else f"`challenger`, {challenger.name}, is there: name it"
    )
    return DataError(f"there is no champion yet; {named}, or let the gate choose a champion with `make retrain`")


def _registered(project: Path, name: str, experiment: str) -> Version | None:
    """Return a version by alias or number, None if no version holds the alias. Raises TrackingError for an unknown number."""
    local = read_versions(project, experiment) or ()
    found = next((version for version in local if name in version.aliases or name == str(version.number)), None)
    if found is not None:
        return found
    registry = Registry(project, experiment)
    return registry.version(int(name)) if name.isdigit() else registry.holding(name)


def _names(paths: Iterable[str]) -> list[str]:
    """Return the short names of models, such as `sft` and `dpo-0`."""
    return [path.removeprefix("models/").removeprefix("align/") for path in paths]


def _locked(project: Path) -> dict[str, str]:
    """Return the MD5 of every model of dvc.lock by its path."""
    outputs = [out for stage in read_lock(project).values() for out in stage.get("outs", ())]
    return {str(out["path"]): str(out["md5"]) for out in outputs if str(out["path"]).startswith("models/")}

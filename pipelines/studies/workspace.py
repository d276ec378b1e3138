"""Prepare the workspaces of a study: a copy of the code with the study's parameters, which shares the project's DVC cache.

Arms that change only their algorithm share one workspace, so that they share data, supervised and reward model. An arm that changes
other parameters has its own. DVC decides in each workspace which stages are stale, as in the project.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipelines.config.own_code import code_folder
from pipelines.config.params import Params, merged, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.studies.study import FOLDER, Study
from posttrain.errors import ConfigError

HOME = Path(".posttrain/studies")
KEPT = {
    *(
        "data",
        "models",
        "runs",
        "report",
        "dvc.lock",
        "params.yaml",
        "mlflow.db",
        "mlruns",
        "mlartifacts",
        "inbox",
        "site",
    ),
    *("tests", "docs", "benchmarks", "infra", "flows", "tasks"),
}
"""Files and folders of the project that are not copied: results, and code that no stage uses."""
GIVEN = (Path("data/raw"), Path("data/benchmarks"))
"""Folders within `data` that stages read and no stage writes."""


@dataclass(frozen=True)
class Workspace:
    """A folder in which some arms of a study run, and its parameters."""

    folder: Path
    arms: tuple[str, ...]
    """None in the workspace of the pretraining, which stops after the stage `sft`."""
    params: Mapping[str, Any]

    def targets(self, seeds: list[int]) -> list[str]:
        """Return the stages of dvc.yaml that evaluate the arms and the models they start from."""
        if not self.arms:
            return ["sft"]
        fixed = ["evaluate@base", "evaluate@sft"]
        return [*fixed, *(f"evaluate_aligned@{arm}-{seed}" for arm in self.arms for seed in seeds)]


def workspaces(root: Path, name: str, study: Study, base: Path | None = None) -> list[Workspace]:
    """Return the study's workspaces, in the order of its arms. `base` replaces the study's own base.

    Raises ConfigError if the parameters of an arm are not valid.
    """
    shared = merged(read_yaml(root / "params.yaml"), _overlay(base or root / FOLDER / study.base))
    first = _pretraining(root, name, study, shared, base)
    shared = merged(shared, study.params)
    if first is not None:
        shared = merged(shared, {"model": {"source": str(first.folder / "models/sft")}})
    groups: dict[str, list[str]] = {}
    for arm in study.arms:
        groups.setdefault(json.dumps(study.arms[arm].params, sort_keys=True), []).append(arm)
    home = _home(name, base)
    return [_workspace(root, home, name, study, arms, shared) for arms in groups.values()]


def pretraining(root: Path, name: str, study: Study, base: Path | None = None) -> Workspace | None:
    """Return the workspace whose supervised model is the base model of all arms, or None if the study has none."""
    shared = merged(read_yaml(root / "params.yaml"), _overlay(base or root / FOLDER / study.base))
    return _pretraining(root, name, study, shared, base)


def _pretraining(root: Path, name: str, study: Study, shared: Any, base: Path | None) -> Workspace | None:
    """Return the workspace of the pretraining. Its folder is named after its parameters, since they decide the model."""
    if study.pretraining is None:
        return None
    tree = merged(shared, study.pretraining)
    tree["project"] = {**tree["project"], "experiment": f"study {name}"}
    make_paths_absolute(root, tree)
    _checked(tree, name, "pretraining")
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]
    return Workspace(root / _home(name, base) / f"pretraining-{digest}", (), tree)


def _home(name: str, base: Path | None) -> Path:
    return HOME / (name if base is None else f"{name}-{base.stem}")


def _checked(tree: Any, name: str, part: str) -> None:
    """Complete `project.code`. Raise ConfigError if the parameters are not valid, or the level depends on seeds that may be added."""
    try:
        if complete(tree, f"study {name}, {part}").report.looks == "always":
            raise ConfigError(
                f"study {name}, {part}: report.looks = always is for comparisons whose seeds are added; a study's seeds are fixed before"
                " its runs, so give the number of its series"
            )
    except ConfigError as error:
        raise ConfigError(f"{error}. Correct examples/studies/{name}.yaml or its base.") from None


def complete(tree: dict[str, Any], name: str) -> Params:
    """Write the folder of own code into the tree, as `posttrain configure` does, and return its parameters.

    Raises ConfigError if they are not valid.
    """
    params = parse_params(tree, name)
    folder = code_folder(params)
    if folder is None:
        return params
    tree["project"] = {**tree["project"], "code": folder}
    return parse_params(tree, name)


def _workspace(root: Path, home: Path, name: str, study: Study, arms: list[str], shared: Any) -> Workspace:
    """Return the workspace of arms that share their parameters outside `algorithms`."""
    tree = merged(shared, study.arms[arms[0]].params)
    changed = {"experiment": f"study {name}", "algorithms": list(arms), "seeds": list(study.seeds)}
    tree["project"] = {**tree["project"], **changed}
    tree["algorithms"] = {arm: study.arms[arm].algorithm for arm in arms}
    make_paths_absolute(root, tree)
    _checked(tree, name, ", ".join(arms))
    return Workspace(root / home / arms[0], tuple(arms), tree)


def _overlay(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the base of a study must be a mapping of sections, like params.yaml")
    return tree


def make_paths_absolute(root: Path, tree: dict[str, Any]) -> None:
    """Replace local files and folders of data and model by absolute paths: the workspace is a different folder."""

    def located(source: Any) -> Any:
        if isinstance(source, list):
            return [located(part) for part in source]
        return str((root / source).resolve()) if isinstance(source, str) and (root / source).exists() else source

    for table in ("sft", "preferences", "problems", "evaluation", "labelled", "experts"):
        section = tree["data"].get(table)
        if section is not None:
            section["source"] = located(section["source"])
    tree["model"]["source"] = located(tree["model"]["source"])


def prepare(root: Path, workspace: Workspace) -> None:
    """Write the workspace's code, parameters and DVC configuration; results of earlier runs are kept."""
    folder = workspace.folder
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(root.iterdir()):
        if not source.name.startswith(".") and source.name not in KEPT and not source.name.endswith(".egg-info"):
            _copy(source, folder / source.name)
    for given in GIVEN:
        _copy(root / given, folder / given)
    _copy(root / ".dvcignore", folder / ".dvcignore")
    (folder / "params.yaml").write_text(_yaml(workspace.params), encoding="utf-8")
    _configure_dvc(root, folder)


def _copy(source: Path, target: Path) -> None:
    """Replace `target` by a copy of a file or folder, without compiled modules."""
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    elif source.exists():
        shutil.copy2(source, target)


def _yaml(tree: Mapping[str, Any]) -> str:
    """Return the tree as YAML in block style, which DVC can read."""
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.dump(dict(tree), text)
    return text.getvalue()


def _configure_dvc(root: Path, folder: Path) -> None:
    """Make the folder a DVC workspace without git that uses the project's cache, so that equal stages are restored."""
    from dvc.config import Config

    given = Config(str(root / ".dvc"))["cache"].get("dir")
    cache = Path(given) if given else (root / ".dvc" / "cache").resolve()
    (folder / ".dvc").mkdir(exist_ok=True)
    shutil.copy2(root / ".dvc" / "config", folder / ".dvc" / "config")
    local = f"[core]\n    no_scm = true\n[cache]\n    dir = {cache}\n"
    (folder / ".dvc" / "config.local").write_text(local, encoding="utf-8")

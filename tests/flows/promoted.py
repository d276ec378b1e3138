"""A workspace with three versions in its registry, for the tests of promotions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.production import registry_of, switch
from pipelines.config.yaml_files import read_yaml
from pipelines.promotion.registry import Version
from tasks import gate
from tasks.champion import FOLDER
from tests.workspace import copy, dvc


@pytest.fixture(scope="module")
def promoted(template: Path, root: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose registry holds three versions; the first is champion."""
    made = copy(template, tmp_path_factory.mktemp("promoted") / "work space")
    shutil.copy(root / "params.yaml", made)
    shutil.copy(empty_store, made / "mlflow.db")
    names = {"one": "models/model-1", "two": "models/model-2", "three": "models/model-3"}
    for text, name in names.items():
        (made / name).mkdir(parents=True)
        (made / name / "weights").write_text(text)
    dvc(made, "add", "-q", *names.values())
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = registry_of(made)
        for text, name in names.items():
            (entry,) = read_yaml(made / f"{name}.dvc")["outs"]
            registry.register_entry(text, name, entry, {}, "")
        promote(made, 1)
    return made


@pytest.fixture
def project(promoted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("POSTTRAIN_WEBHOOK", raising=False)
    return copy(promoted, tmp_path / "work space")


def promote(project: Path, number: int) -> Version:
    registry = registry_of(project)
    return switch(project, lambda: registry.version(number), lambda found: registry.promote(found.number))


def aliases(project: Path) -> dict[str, int]:
    return {alias: each.number for each in registry_of(project).versions() for alias in each.aliases}


def weights(project: Path) -> str:
    return (project / FOLDER / "weights").read_text()


def situation(project: Path) -> gate.Situation:
    registry = registry_of(project)
    known = frozenset(each.md5 for each in registry.versions())
    return gate.Situation(registry.holding("champion"), (), {}, registry.state(), known)

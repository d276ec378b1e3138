"""Hands and second projects that change production while a command is at work, and the weights that garbage collection keeps."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows import clean_cache
from flows.gatekeeping import decide_promotion
from flows.lock import only_flow
from flows.production import registry_of, switch
from flows.promote import _adopt, _roll_back
from flows.promote import promote as promote_flow
from pipelines.config.yaml_files import read_yaml
from pipelines.promotion.registry import Registry, Version
from posttrain.errors import OrchestrationError, TrackingError
from tasks import champion as champion_module
from tasks import gate
from tasks.cache import cached
from tasks.champion import POINTER
from tests.flows.promoted import aliases, promote, situation, weights
from tests.workspace import copy, dvc

TRAINED_ALONE = (
    "schema: '2.0'\nstages:\n  align@dpo-0:\n    cmd: x\n    outs:\n    - path: models/align/dpo-0\n"
    "      md5: {md5}\n      size: {size}\n      nfiles: {nfiles}\n"
)


@pytest.mark.parametrize("change", ["promotion", "roll-back of the candidate"])
def test_a_change_of_production_by_hand_while_the_gate_judges_is_kept(
    project: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """Compare with a champion that is champion no longer, or judge weights that a person condemns meanwhile."""
    (entry,) = read_yaml(project / "models/model-2.dvc")["outs"]
    (project / "dvc.lock").write_text(TRAINED_ALONE.format(**entry))
    decision = {"promote": True, "challenger": "dpo-0", "reference": "version 1", "refusals": []}

    def ask(*_: Any) -> dict[str, Any]:
        if change == "promotion":
            promote(project, 3)
        else:
            registry_of(project).tag(2, {"rolled_back": "bad"})
        return decision

    monkeypatch.setattr(gate, "ask", ask)
    monkeypatch.setattr(gate, "publish", lambda *_: None)

    @flow(persist_result=False)
    def night() -> None:
        decide_promotion(project, tracking=False, approval=False)

    night()
    assert "production was changed by hand meanwhile, so it is not promoted" in capsys.readouterr().out
    champion, text = (3, "three") if change == "promotion" else (1, "one")
    assert (aliases(project)["champion"], weights(project)) == (champion, text)
    assert not (project / gate.SETTLED).exists(), "the next run judges again"
    assert ("rolled_back" in registry_of(project).version(2).tags) == (change != "promotion")


def test_an_alias_of_the_champion_that_was_deleted_by_hand_promotes_nothing(project: Path) -> None:
    registry = registry_of(project)
    registry._drop_alias("champion")
    with pytest.raises(OrchestrationError, match=r"no version has the alias champion.*`python -m flows\.promote N`"):
        gate.require_known_weights(project, situation(project))
    promote(project, 1)
    gate.require_known_weights(project, situation(project))


def test_a_flipped_bit_in_the_pointer_of_the_champion_is_not_adopted(project: Path) -> None:
    """Register no weights that no cache holds: the hash is a valid one, of nothing."""
    path, md5 = project / POINTER, registry_of(project).version(1).md5
    text = path.read_text()
    path.write_text(text.replace(md5, ("0" if md5[0] != "0" else "1") + md5[1:]))
    with pytest.raises(
        OrchestrationError, match=r"not in DVC's cache, so nothing was changed.*`git checkout champion\.dvc`"
    ):
        _adopt(project, registry_of(project))
    assert aliases(project) == {"champion": 1}
    assert len(registry_of(project).versions()) == 3


def test_a_roll_back_while_a_second_project_promotes_rolls_nothing_else_back(
    project: Path, tmp_path: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clones share a registry, and each has its own lock."""
    promote(project, 2)
    second = copy(project, tmp_path / "second")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlflow.db'}")
    found = Registry.roll_back_pair

    def slow(registry: Registry) -> tuple[Version, Version]:
        pair = found(registry)
        if not promoted:
            promoted.append(promote(second, 3))
        return pair

    promoted: list[Version] = []
    monkeypatch.setattr(Registry, "roll_back_pair", slow)

    @flow(persist_result=False)
    def roll_back() -> None:
        _roll_back(project, registry_of(project), "it answers in French")

    with pytest.raises(
        TrackingError, match=r"version 3 \(three\) became champion .* while this roll-back of version 2"
    ):
        roll_back()
    assert aliases(project) == {"champion": 3, "previous": 2}
    assert weights(project) == "two", "the folder is as before, and the next flow follows the registry"
    assert not registry_of(project).barred()


@pytest.mark.parametrize("by", ["gate", "hand"])
def test_a_promotion_while_a_second_project_promotes_changes_nothing(
    project: Path, tmp_path: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Promote in the second project after the last check of the first, which is bringing the weights."""
    second = copy(project, tmp_path / "second")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlflow.db'}")
    promoted: list[Version] = []
    bring = champion_module.restore

    def slow(root: Path, version: Version) -> None:
        bring(root, version)
        if not promoted:
            promoted.append(version)
            promote(second, 3)

    monkeypatch.setattr(champion_module, "restore", slow)
    monkeypatch.chdir(project)

    @flow(persist_result=False)
    def night() -> Version | None:
        if by == "gate":
            return gate.make_champion(str(project), 2, 1)
        return promote_flow(2)  # type: ignore[return-value]

    if by == "gate":
        assert night() is None, "the next run judges again"
    else:
        with pytest.raises(TrackingError, match=r"version 3 \(three\) became champion of .* while version 2"):
            night()
    assert aliases(project) == {"champion": 3, "previous": 1}
    assert weights(project) == "one", "the folder is as before, and the next flow follows the registry"


def test_the_projects_own_gc_keeps_the_weights_of_every_alias(project: Path) -> None:
    """Deletes only weights without an alias, and a roll-back to `previous` still works."""
    promote(project, 2)
    for number in (1, 2, 3):
        (project / f"models/model-{number}.dvc").unlink()
        shutil.rmtree(project / f"models/model-{number}")
    (project / f"{clean_cache.KEPT}-9.dvc").write_text("left by a killed command")
    with only_flow(project), pytest.raises(OrchestrationError, match="a flow is already running"):
        clean_cache.collect(project, delete=True)
    assert clean_cache.collect(project, delete=False) == 2, "the folder and the file of version 3"
    assert clean_cache.collect(project, delete=True) == 2
    assert not list(project.glob("*kept*"))
    registry = registry_of(project)
    assert [cached(project, registry.version(number).md5) for number in (1, 2, 3)] == [True, True, False]
    assert clean_cache.collect(project, delete=True) == 0
    registry._drop_alias("champion")
    with pytest.raises(OrchestrationError, match=r"that a roll-back needs are unknown\. Nothing was"):
        clean_cache.collect(project, delete=True)
    registry._set_alias("champion", 2)
    switch(project, lambda: registry.roll_back_pair()[1], lambda _: registry.roll_back("bad"))
    assert (aliases(project)["champion"], weights(project)) == (1, "one")


def test_the_files_of_worktrees_and_of_other_users_of_the_cache_are_kept(project: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["add", "-A"], [*who, "commit", "-qm", "all"], ["worktree", "add", "-q", str(second)]):
        subprocess.run(["git", *command], cwd=project, check=True)
    cache = project / ".dvc" / "cache"
    (second / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {cache}\n")
    (second / "own.txt").write_text("only in the second")
    dvc(second, "add", "-q", "own.txt")
    assert clean_cache.worktrees(project) == [second]
    with only_flow(second), pytest.raises(OrchestrationError, match=rf"a flow is already running in {second}"):
        clean_cache.collect(project, delete=True)
    assert clean_cache.collect(project, delete=True) == 0
    (second / "own.txt").unlink()
    dvc(second, "checkout", "own.txt.dvc")
    assert clean_cache.worktrees(second) == [project]
    (project / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {tmp_path / 'shared'}\n")
    with pytest.raises(OrchestrationError, match=r"DVC's cache is .*shared, outside of this project.*--projects DIR"):
        clean_cache.collect(project, delete=True)
    (tmp_path / "shared").mkdir()
    assert clean_cache.collect(project, [project], delete=True) == 0

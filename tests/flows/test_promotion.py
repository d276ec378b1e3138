"""Registry and models/champion agree after every promotion: at once, during a flow, after a lost registry."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prefect import flow

from flows.gatekeeping import decide_promotion
from flows.lock import only_flow
from flows.production import bring_pending, reconcile, registry_of, switch
from flows.promote import _adopt, _refuse_stale, _roll_back
from flows.promote import promote as promote_flow
from pipelines.commands.configure import configure
from pipelines.config.yaml_files import read_yaml
from pipelines.promotion.registry import Registry, Version
from posttrain.errors import OrchestrationError, TrackingError
from tasks import gate
from tasks.champion import FOLDER, PENDING, POINTER, holds, pointer, production
from tasks.measure import measure
from tests.flows.promoted import aliases, promote, situation, weights
from tests.workspace import dvc

LOOP = """
import sys
from pathlib import Path
from typing import Any
from flows.production import registry_of, switch
root, number = Path(sys.argv[1]), int(sys.argv[2])
registry = registry_of(root)
print("ready", flush=True)
sys.stdin.readline()
switch(root, lambda: registry.version(number), lambda found: registry.promote(found.number))
"""


def test_two_promotions_at_once_leave_registry_and_folder_with_the_same_version(project: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOOP, str(project), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in (2, 3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    after = aliases(project)
    assert set(after.values()) == {2, 3}
    assert weights(project) == {2: "two", 3: "three"}[after["champion"]]
    assert holds(project, registry_of(project).version(after["champion"]))
    assert not (project / PENDING).exists()


def test_a_roll_back_during_a_flow_reaches_the_folder_when_the_flow_ends(
    project: Path, prefect_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(project, 2)

    @flow(persist_result=False)
    def roll_back() -> None:
        _roll_back(project, registry_of(project), "it answers in French")

    with only_flow(project):
        roll_back()
        assert "models/champion does not hold version 1 (one) yet" in capsys.readouterr().out
        assert (aliases(project)["champion"], weights(project)) == (1, "two")
        bring_pending(project)
        assert weights(project) == "two", "the flow that is running still uses the folder"
    bring_pending(project)
    assert weights(project) == "one"
    assert "models/champion now holds version 1 (one)" in capsys.readouterr().out
    assert not (project / PENDING).exists()

    with pytest.raises(TrackingError, match="is champion after a roll-back"):
        _roll_back(project, registry_of(project), "again")
    assert weights(project) == "one"


def test_a_promotion_by_hand_copies_the_weights_to_the_remote_first(
    project: Path, tmp_path: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    dvc(project, "remote", "add", "-q", "-d", "store", "/dev/null/store")
    with pytest.raises(OrchestrationError, match=r"/dev/null/store could not be asked.*so nothing was changed"):
        promote_flow(2)
    assert (aliases(project), weights(project)) == ({"champion": 1}, "one")

    dvc(project, "remote", "modify", "store", "url", str(tmp_path / "store"))
    promote_flow(2)
    assert (aliases(project)["champion"], weights(project)) == (2, "two")
    shutil.rmtree(project / ".dvc" / "cache")
    shutil.rmtree(project / FOLDER)
    dvc(project, "pull", "-q", POINTER.as_posix())
    assert weights(project) == "two"


def test_a_roll_back_to_weights_that_gc_removed_is_refused_and_changes_nothing(project: Path) -> None:
    promote(project, 2)
    (project / "models" / "model-1.dvc").unlink()
    dvc(project, "gc", "--workspace", "--force", "--quiet")
    before = aliases(project)
    with pytest.raises(OrchestrationError, match=r"weights of version 1 \(one\).*neither in DVC's cache nor in its"):
        _roll_back(project, registry_of(project), "it answers in French")
    assert aliases(project) == before == {"champion": 2, "previous": 1}
    assert weights(project) == "two"
    assert dvc(project, "status", "--json", POINTER.as_posix()).strip() == "{}"


def test_aliases_that_cannot_be_moved_leave_the_folder_as_it_was(project: Path) -> None:
    registry = registry_of(project)

    def fail(_: Version) -> None:
        raise TrackingError("MLflow did not respond")

    with pytest.raises(TrackingError):
        switch(project, lambda: registry.version(3), fail)
    assert (aliases(project), weights(project)) == ({"champion": 1}, "one")
    assert (project / PENDING).is_file(), "the next flow compares registry and folder"


def test_an_alias_moved_by_hand_is_followed(project: Path, prefect_url: str) -> None:
    registry = registry_of(project)
    before = registry.state()
    registry._set_alias("champion", 3)
    assert registry.state() != before, "a decision about the state before is not reused"
    gate.require_known_weights(project, situation(project))

    @flow(persist_result=False)
    def end_of_a_night() -> None:
        reconcile(project)

    end_of_a_night()
    assert weights(project) == "three"


def test_a_registry_that_does_not_know_the_weights_in_production_promotes_nothing(
    project: Path, empty_store: Path, prefect_url: str
) -> None:
    promote(project, 3)
    registry = registry_of(project)
    registry._client.delete_model_version(registry.name, "3")  # by hand, on MLflow's page
    with pytest.raises(OrchestrationError, match="does not know; it has no champion"):
        gate.require_known_weights(project, situation(project))

    shutil.copy(empty_store, project / "mlflow.db")
    lost = Registry(project, registry.name)
    with pytest.raises(OrchestrationError, match=r"`python -m flows\.promote --adopt`"):
        gate.require_known_weights(project, situation(project))
    assert weights(project) == "three"

    @flow(persist_result=False)
    def adopt() -> None:
        _adopt(project, lost)

    adopt()
    assert aliases(project) == {"champion": 1}
    assert lost.version(1).md5 == production(project)
    gate.require_known_weights(project, situation(project))
    with pytest.raises(OrchestrationError, match=r"are version 1 \(adopted\) already"):
        _adopt(project, lost)


def test_an_older_registry_is_refused_and_a_damaged_pointer_is_named(project: Path) -> None:
    shutil.copy(project / "mlflow.db", project / "backup.db")
    entry = {"md5": "4" * 32 + ".dir", "size": 4, "nfiles": 1}
    later = registry_of(project).register_entry("four", "models/model-4", entry, {}, "")
    (project / POINTER).write_text(pointer(later))
    gate.require_known_weights(project, situation(project))
    shutil.copy(project / "backup.db", project / "mlflow.db")
    with pytest.raises(OrchestrationError, match=r"does not know; it names version 1 \(one\) as champion"):
        gate.require_known_weights(project, situation(project))
    for text in ("", "outs:\n- md5: abc\n", "\0" * 40, "<<<<<<< ours\n"):
        (project / POINTER).write_text(text)
        with pytest.raises(OrchestrationError, match=r"champion\.dvc is damaged"):
            production(project)
    (project / POINTER).unlink()
    assert production(project) is None


def test_a_night_promotes_once_and_decides_again_after_a_roll_back(
    project: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (entry,) = read_yaml(project / "models/model-2.dvc")["outs"]
    (project / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  align@dpo-0:\n    cmd: x\n    outs:\n    - path: models/align/dpo-0\n"
        f"      md5: {entry['md5']}\n      size: {entry['size']}\n      nfiles: {entry['nfiles']}\n"
    )
    decision = {"promote": True, "challenger": "dpo-0", "reference": "version 1", "refusals": []}
    asked: list[int] = []
    monkeypatch.setattr(gate, "ask", lambda *_: asked.append(1) or decision)
    monkeypatch.setattr(gate, "publish", lambda *_: None)

    @flow(persist_result=False)
    def night() -> None:
        decide_promotion(project, tracking=False, approval=False)

    night()
    assert (aliases(project), weights(project)) == ({"champion": 2, "previous": 1}, "two")
    assert registry_of(project).version(2).tags["judged_against"] == "1"
    night()
    assert "nothing new to decide: version 2 (dpo-0) is champion, in place of version 1" in capsys.readouterr().out
    assert len(asked) == 1
    registry_of(project)._set_alias("champion", 1)  # by hand, on MLflow's page
    decision["promote"], decision["refusals"] = False, ["it is not better"]
    night()
    assert len(asked) == 2, "what was decided about another champion does not count"
    assert (aliases(project)["champion"], weights(project)) == (1, "one")


LOCK = """schema: '2.0'
stages:
  evaluate@sft:
    cmd: x
    deps:
    - path: data/valid/evaluation.parquet
      md5: {table}
"""
TRAINED = "  align@{name}:\n    cmd: x\n    outs:\n    - path: models/align/{name}\n      md5: {md5}\n"


def test_a_decision_by_other_prompts_or_another_measure_is_refused(project: Path) -> None:
    registry = registry_of(project)
    (project / "dvc.lock").write_text(LOCK.format(table="1" * 32))
    registry.tag(3, {"judged_against": "1", "judged_by": measure(project)})
    _refuse_stale(registry, registry.version(3), "1")

    (project / "dvc.lock").write_text(LOCK.format(table="2" * 32))
    words = r"changed since version 3 \(three\) was judged.*`make retrain` to judge again"
    with pytest.raises(OrchestrationError, match=words):
        _refuse_stale(registry, registry.version(3), "1")
    (project / "dvc.lock").write_text(LOCK.format(table="1" * 32))
    _refuse_stale(registry, registry.version(3), "1")
    configure(project / "params.yaml", ["gate.max_kl=0.001"])
    with pytest.raises(OrchestrationError, match=words):
        _refuse_stale(registry, registry.version(3), "1")
    assert aliases(project) == {"champion": 1}


def test_an_algorithm_that_is_added_in_the_week_is_judged_once_it_is_trained(project: Path) -> None:
    configure(project / "params.yaml", ["project.algorithms=[dpo]", "project.seeds=[0]"])
    (project / "dvc.lock").write_text(LOCK.format(table="1" * 32) + TRAINED.format(name="dpo-0", md5="5" * 32))
    before = gate.look_up.fn(str(project))
    assert before.candidates == ("dpo-0",)
    gate.settle(project, "dpo-0 was refused", before.registry)
    assert gate.settled(project, before.registry) == "dpo-0 was refused"

    configure(project / "params.yaml", ["project.algorithms=[dpo, grpo]"])
    assert gate.look_up.fn(str(project)).candidates == ("dpo-0",), "grpo has no weights yet"
    with (project / "dvc.lock").open("a") as file:
        file.write(TRAINED.format(name="grpo-0", md5="6" * 32))
    assert gate.look_up.fn(str(project)).candidates == ("dpo-0", "grpo-0")
    assert gate.settled(project, before.registry) is None, "the gate decides again"

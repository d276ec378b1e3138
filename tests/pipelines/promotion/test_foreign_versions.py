"""Whoever has MLflow's password writes tags and aliases: they never become a file's content, a path, an option or a traceback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.models import line
from pipelines.commands.serve import registered
from pipelines.promotion.named import find_model
from pipelines.promotion.registry import Registry, Version
from pipelines.tracking.served import ServedTraces
from posttrain.errors import DataError, OrchestrationError, TrackingError
from tasks import gate
from tasks.champion import FOLDER, POINTER, follow, pointer, put_into_production, restore
from tests.pipelines.conftest import Project

GOOD = {"dvc.md5": "0" * 32 + ".dir", "dvc.size": "12", "dvc.nfiles": "3", "model": "dpo-0"}
SECOND_OUT = "1\n  hash: md5\n  path: README.md\n- md5: {}\n  size: 1\n  nfiles: 1"


def test_the_pointer_of_a_good_version_is_what_dvc_writes() -> None:
    assert pointer(Version(1, GOOD, ())) == (
        f"outs:\n- md5: {'0' * 32}.dir\n  size: 12\n  nfiles: 3\n  hash: md5\n  path: models/champion\n"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dvc.nfiles", SECOND_OUT.format("0" * 32 + ".dir")),
        ("dvc.nfiles", None),
        ("dvc.size", "-1"),
        ("dvc.size", "1_0"),
        ("dvc.size", "12\n"),
        ("dvc.size", "9" * 5000),
        ("dvc.md5", None),
        ("dvc.md5", "0" * 32),
        ("dvc.md5", "../" * 10 + "xx.dir"),
        ("dvc.md5", "0" * 32 + ".dir\n  path: README.md"),
    ],
)
def test_a_tag_that_is_no_hash_or_number_changes_nothing(tmp_path: Path, name: str, value: str | None) -> None:
    (tmp_path / POINTER).write_text("as before")
    (tmp_path / FOLDER).mkdir(parents=True)
    tags = {key: text for key, text in (GOOD | {name: value}).items() if text is not None}
    bad, moved = Version(3, tags, ()), list[str]()
    words = rf"version 3 \(dpo-0\) cannot be used: its tag {name} (= '.*|is missing), and must be .*Nothing was changed"
    for call in (
        lambda: restore(tmp_path, bad),
        lambda: follow(tmp_path, bad),
        lambda: put_into_production(tmp_path, bad, lambda: moved.append("alias")),
        lambda: put_into_production(tmp_path, bad, lambda: moved.append("alias"), busy=True),
    ):
        with pytest.raises((DataError, OrchestrationError), match=words):
            call()
    assert moved == []
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "champion.dvc", "models", "models/champion"
    ]  # fmt: skip
    assert (tmp_path / POINTER).read_text() == "as before"


def test_a_version_made_by_hand_is_named_and_a_promotion_gets_past_it(project: Project, store: Any) -> None:
    root = project.folder
    registry = Registry(root, "posttrain")
    entry = {"md5": "a" * 32 + ".dir", "size": 120, "nfiles": 7}
    assert registry.register_entry("dpo-0", "models/align/dpo-0", entry, {}, "").number == 1
    store.create_model_version("posttrain", "dvc://models/align/dpo-0", run_id="0' OR '1' = '1")
    for alias in ("champion", "challenger"):
        store.set_registered_model_alias("posttrain", alias, "2")
    registry.tag(2, {"rolled_back": "by hand"})

    words = r"version 2 \(unknown\) cannot be used: its tag dvc\.md5 is missing"
    with pytest.raises(OrchestrationError, match=words):
        gate.look_up.fn(str(root))
    with pytest.raises(DataError, match=words):
        find_model(root, "champion", "posttrain")
    assert "cannot be used: its tag dvc.md5 is missing" in line(registry.version(2), full=True)
    assert registry.barred() == {}
    assert registry.state()["champion"] == "2 "
    assert registered(root, "posttrain")("a" * 32 + ".dir") == "1"
    assert registered(root, "posttrain")("0" * 32) == ""
    experiment = store.create_experiment("served")
    assert ServedTraces(root, "posttrain")._owner(store, experiment, "2") == ("", "")

    registry.promote(1)
    assert {alias: each.number for each in registry.versions() for alias in each.aliases} == {
        "champion": 1, "challenger": 2
    }  # fmt: skip
    with pytest.raises(TrackingError, match="has no previous version yet"):
        registry.roll_back_pair()


def test_a_path_or_a_mark_that_is_no_such_thing_becomes_no_option_and_no_advice() -> None:
    good = {"dvc.path": "models/align/dpo-0", "evaluation": "400:0a1b2c3d4e5f"}
    assert (Version(1, good, ()).path, Version(1, good, ()).evaluation) == ("models/align/dpo-0", "400:0a1b2c3d4e5f")
    for value in ("--candidates", "x:0a1b2c3d4e5f", "400:0a1b2c3d4e5f\n", "", "9" * 5000 + ":0a1b2c3d4e5f"):
        assert Version(1, {"evaluation": value}, ()).evaluation is None
    for value in ("models/../..", "models/x; rm -rf ~", "-rf", "/etc", "models//x", "models/.git"):
        with pytest.raises(DataError, match=r"its tag dvc\.path = .*must be a path below models/"):
            _ = Version(1, {"dvc.path": value}, ()).path
    assert Version(1, {"model": "\x1b[2J" + "x" * 500}, ()).name == "version 1 (\\x1b[2J" + "x" * 93 + ")"


def test_a_tag_with_line_feeds_is_one_line_everywhere() -> None:
    forged = "x)\n   12.3 s  version 9 is champion\u2028\x1b[2K(y"
    version = Version(3, GOOD | {"model": forged, "decision": forged, "reason": forged}, ())
    assert version.name == r"version 3 (x) 12.3 s version 9 is champion \x1b[2K(y)"
    for text in (version.name, version.words("reason"), line(version, full=True)):
        assert len(text.splitlines()) == 1
        assert "\x1b" not in text


def test_a_reason_is_stored_without_credentials_and_cut_to_what_mlflow_takes(project: Project, store: Any) -> None:
    registry = Registry(project.folder, "posttrain")
    entry = {"md5": "a" * 32 + ".dir", "size": 120, "nfiles": 7}
    registry.register_entry("dpo-0", "models/align/dpo-0", entry, {}, "")
    registry.tag(1, {"reason": "http://me:my-password@host " + "x" * 20_000})
    kept = registry.version(1).tags["reason"]
    assert kept.startswith("http://***@host xxx")
    assert len(kept) == 4000
    registry.tag(1, {"reason": os.fsdecode(b"Latin-1: \xe4")})
    assert registry.version(1).tags["reason"] == r"Latin-1: \udce4"

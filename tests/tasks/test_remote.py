"""A version is registered only if DVC's remote itself lists every file of its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from prefect import flow

from pipelines.promotion.registry import Registry
from posttrain.errors import OrchestrationError
from tasks import gate
from tasks.dag import read_dag
from tasks.remote import push
from tests.workspace import dvc

MODEL = "models/align/dpo-0"
DECISION = {"promote": True, "challenger": "dpo-0", "reference": "sft", "refusals": []}


@pytest.fixture
def trained(workspace: Path, tmp_path: Path) -> tuple[Path, str]:
    """A workspace whose dvc.lock names a model of two files, and a remote; the model's hash."""
    command = f"mkdir -p {MODEL} && printf weights > {MODEL}/weights && printf [] > {MODEL}/config.json"
    (workspace / "dvc.yaml").write_text(f"stages:\n  train:\n    cmd: {command}\n    outs: [{MODEL}]\n")
    dvc(workspace, "repro", "-q", "train")
    add_remote(workspace, str(tmp_path / "store"))
    (md5,) = [line.split()[-1] for line in (workspace / "dvc.lock").read_text().splitlines() if "md5: " in line]
    return workspace, md5


def add_remote(root: Path, url: str) -> None:
    (root / ".dvc" / "config").write_text(f"[core]\n    remote = store\n['remote \"store\"']\n    url = {url}\n")


def objects(folder: Path) -> dict[str, Path]:
    return {path.parent.name + path.name: path for path in (folder / "files" / "md5").rglob("*") if path.is_file()}


def member(root: Path, md5: str) -> str:
    """Return the hash of config.json."""
    listing = json.loads(objects(root / ".dvc" / "cache")[md5].read_text())
    return str(next(entry["md5"] for entry in listing if entry["relpath"] == "config.json"))


def test_a_file_that_the_cache_has_lost_stops_the_promotion_before_anything_changes(
    trained: tuple[Path, str], tmp_path: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, md5 = trained
    touched: list[str] = []
    monkeypatch.setattr(Registry, "__init__", lambda *_: touched.append("registry"))
    lost = member(root, md5)
    objects(root / ".dvc" / "cache")[lost].unlink()
    assert dvc(root, "push") is not None, "dvc itself ends with success"
    assert lost not in objects(tmp_path / "store")

    @flow(persist_result=False)
    def night() -> None:
        gate.register(str(root), DECISION)

    with pytest.raises(
        OrchestrationError, match=rf"1 files of {MODEL} \({md5}\) are neither in DVC's cache.*first: {lost}"
    ) as caught:
        night()
    assert touched == []

    advice = str(caught.value).split("`")[1]
    assert advice == f"dvc commit --force {MODEL}"
    dvc(root, *advice.split()[1:])
    assert push(root, MODEL, md5) is True
    assert lost in objects(tmp_path / "store")


def test_a_remote_that_has_lost_files_gets_them_again_though_dvc_says_up_to_date(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    root, md5 = trained
    assert push(root, MODEL, md5) is True
    lost = member(root, md5)
    objects(tmp_path / "store")[lost].unlink()
    assert "Everything is up to date" in dvc(root, "push")
    assert push(root, MODEL, md5) is True
    assert objects(tmp_path / "store")[lost].read_text() == "[]"
    shutil.rmtree(tmp_path / "store")
    assert push(root, MODEL, md5) is True
    assert {md5, lost} < set(objects(tmp_path / "store"))


def test_without_a_remote_nothing_is_pushed_and_without_weights_it_is_said(workspace: Path, tmp_path: Path) -> None:
    assert push(workspace, MODEL, "0" * 32) is False
    add_remote(workspace, str(tmp_path / "store"))
    with pytest.raises(OrchestrationError, match=rf"{MODEL} is not in dvc.lock"):
        push(workspace, MODEL, "")
    with pytest.raises(OrchestrationError, match=r"neither in DVC's cache nor in .*first: 0{32}\.dir"):
        push(workspace, MODEL, "0" * 32 + ".dir")


def test_the_reason_of_a_failed_push_is_in_the_error(trained: tuple[Path, str]) -> None:
    root, md5 = trained
    add_remote(root, "/dev/null/store")
    with pytest.raises(
        OrchestrationError, match=r"`dvc push` to /dev/null/store failed.*Not a directory: '/dev/null/store/"
    ) as caught:
        push(root, MODEL, md5)
    assert "Having any troubles" not in str(caught.value)


@pytest.mark.parametrize("option", ["version_aware", "worktree"])
def test_a_remote_that_keeps_versions_by_itself_is_refused_before_anything_is_pushed(
    trained: tuple[Path, str], option: str
) -> None:
    """DVC would write the store's version numbers into dvc.lock, in place of the hashes that the registry uses."""
    root, _ = trained
    (root / ".dvc" / "config").write_text(
        f"[core]\n    remote = store\n['remote \"store\"']\n    url = s3://bucket/dvc\n    {option} = true\n"
    )
    with pytest.raises(
        OrchestrationError, match=rf"'store' has {option}: true.*`dvc remote modify --unset store {option}`"
    ):
        read_dag(root)

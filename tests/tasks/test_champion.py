"""The champion's weights come back from DVC's cache or remote, only by their hash."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines.promotion.registry import Version
from posttrain.errors import DataError, OrchestrationError
from tasks.champion import FOLDER, POINTER, holds, production, put_into_production, restore, switching
from tasks.dag import changed, read_dag
from tasks.remote import push
from tests.workspace import dvc


def version(root: Path, number: int, text: str) -> Version:
    """Weights that DVC keeps and the workspace no longer has."""
    folder = root / "models" / f"model-{number}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / "config.json").write_text("{}")
    dvc(root, "add", "-q", str(folder.relative_to(root)))
    pointer = folder.with_name(folder.name + ".dvc")
    (out,) = YAML(typ="safe").load(pointer.read_text())["outs"]
    return Version(
        number,
        {"dvc.md5": out["md5"], "dvc.size": str(out["size"]), "dvc.nfiles": str(out["nfiles"]), "model": "m"},
        (),
    )


def test_weights_are_restored_by_hash_from_the_cache_then_from_the_remote(workspace: Path, tmp_path: Path) -> None:
    first, second = version(workspace, 1, "one"), version(workspace, 2, "two")
    champion = workspace / FOLDER / "weights"
    restore(workspace, first)
    assert champion.read_text() == "one"
    (workspace / POINTER).write_bytes(b"\xff\xfe\0")  # damaged; the advice is to promote
    restore(workspace, second)
    assert champion.read_text() == "two"

    dvc(workspace, "remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    assert push(workspace, "models/model-1", first.md5) is True
    shutil.rmtree(workspace / ".dvc" / "cache")
    shutil.rmtree(workspace / "models")
    restore(workspace, first)
    assert champion.read_text() == "one"
    assert dvc(workspace, "status", "--json", POINTER.as_posix()).strip() == "{}"


def flip(path: Path) -> None:
    """Change a byte of a read-only object of the cache, as a fault of the disk does."""
    path.chmod(0o644)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    path.chmod(0o444)


def test_damaged_objects_of_the_cache_never_come_into_production(workspace: Path, tmp_path: Path) -> None:
    """DVC trusts a read-only object of its cache, and calls a folder with a flipped bit up to date."""
    first, second = version(workspace, 1, "one"), version(workspace, 2, "two")
    objects = {path.read_text(): path for path in (workspace / ".dvc/cache/files/md5").glob("??/*")}
    restore(workspace, first)
    flip(objects["two"])
    moved: list[str] = []
    for busy, words in ((False, "1 files .* damaged in DVC's cache .*`dvc commit --force"), (True, "or are damaged")):
        with pytest.raises(OrchestrationError, match=words):
            put_into_production(workspace, second, lambda: moved.append("alias"), busy=busy)
    assert (moved, (workspace / FOLDER / "weights").read_text(), holds(workspace, first)) == ([], "one", True)

    store = tmp_path / "store"
    dvc(workspace, "remote", "add", "-q", "-d", "store", str(store))
    with pytest.raises(DataError, match=r"damaged in DVC's cache.*so no version was registered"):
        push(workspace, "models/model-2", second.md5)
    assert not store.exists(), "no damaged bytes are pushed"
    flip(objects["two"])
    shutil.copytree(workspace / ".dvc/cache/files", store / "files")
    flip(objects["two"])
    restore(workspace, second)
    assert (workspace / FOLDER / "weights").read_text() == objects["two"].read_text() == "two", "from the remote"


def test_weights_that_are_nowhere_are_an_error_that_names_them(workspace: Path) -> None:
    lost = Version(3, {"dvc.md5": "0" * 32 + ".dir", "dvc.size": "1", "dvc.nfiles": "1", "dvc.path": "models/x"}, ())
    with pytest.raises(
        OrchestrationError, match=r"weights of version 3 \(unknown\) \(0{32}\.dir, models/x\) are neither in"
    ):
        restore(workspace, lost)


@pytest.mark.parametrize("damaged", [b"\xff\xfe\x00", b"\0" * 40, b"outs:\n- md5: [1]\n  size: 1\n", b"outs: 3\n"])
def test_a_damaged_pointer_is_named_and_holds_no_version(tmp_path: Path, damaged: bytes) -> None:
    known = Version(1, {"dvc.md5": "0" * 32 + ".dir", "dvc.size": "1", "dvc.nfiles": "1"}, ())
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / POINTER).write_bytes(damaged)
    with pytest.raises(OrchestrationError, match=r"champion\.dvc is damaged.*promoting a version"):
        production(tmp_path)
    assert not holds(tmp_path, known)


def test_production_is_not_moved_to_weights_that_are_nowhere(workspace: Path) -> None:
    first = version(workspace, 1, "one")
    restore(workspace, first)
    pointer = (workspace / POINTER).read_text()
    lost = Version(3, {"dvc.md5": "0" * 32 + ".dir", "dvc.size": "1", "dvc.nfiles": "1", "dvc.path": "models/x"}, ())
    moved: list[str] = []
    for busy, words in ((False, "neither in DVC's cache"), (True, "cannot be fetched while a flow is running here")):
        with pytest.raises(OrchestrationError, match=words):
            put_into_production(workspace, lost, lambda: moved.append("alias"), busy=busy)
    assert moved == []
    assert (workspace / POINTER).read_text() == pointer
    assert (workspace / FOLDER / "weights").read_text() == "one"
    assert holds(workspace, first)
    assert not holds(workspace, lost)
    # beside a flow at work only the alias moves
    assert put_into_production(workspace, first, lambda: "moved", busy=True) == "moved"
    # a stray file in the folder is no change of any node
    (workspace / FOLDER / "stray").write_text("x")
    assert "champion.dvc" not in read_dag(workspace)
    assert "champion.dvc" not in changed(workspace)


def test_two_promotions_at_once_take_turns(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def promotion(number: int) -> None:
        with switching(tmp_path):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    threads = [threading.Thread(target=promotion, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]

"""A dvc.lock that a kill or a full disk has cut is replaced by the copy of the last whole one; the next run ends as any other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.dag import changed
from tasks.lock_copy import COPY, keep_lock, mend_lock
from tasks.stage import StageFailed, bring_up_to_date

WHOLE = b"schema: '2.0'\nstages:\n  sft:\n    cmd: x\n"


@pytest.mark.parametrize("damage", [b"", b"\0" * len(WHOLE), WHOLE[:9], WHOLE[:-8]])
def test_a_damaged_lock_is_replaced_by_the_copy(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    lock = tmp_path / "dvc.lock"
    lock.write_bytes(WHOLE)
    keep_lock(tmp_path)
    assert not mend_lock(tmp_path), "it is whole"
    lock.write_bytes(damage)
    keep_lock(tmp_path)
    assert (tmp_path / COPY).read_bytes() == WHOLE
    assert mend_lock(tmp_path)
    assert lock.read_bytes() == WHOLE


def test_a_merge_conflict_and_a_lock_without_a_copy_stay(tmp_path: Path) -> None:
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    lock = tmp_path / "dvc.lock"
    lock.write_bytes(b"")
    assert not mend_lock(tmp_path)
    lock.write_bytes(WHOLE)
    keep_lock(tmp_path)
    conflict = b"<<<<<<< HEAD\n" + WHOLE
    lock.write_bytes(conflict)
    assert not mend_lock(tmp_path)
    assert lock.read_bytes() == conflict


def test_stages_in_threads_keep_it_at_once(tmp_path: Path) -> None:
    locks = [WHOLE + f"  stage-{i}:\n    cmd: x\n".encode() for i in range(8)]
    (tmp_path / "dvc.lock").write_bytes(WHOLE)

    def keep(i: int) -> None:
        for _ in range(40):
            next_one = tmp_path / f"next-{i}"
            next_one.write_bytes(locks[i])
            next_one.replace(tmp_path / "dvc.lock")
            keep_lock(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(keep, range(8)))
    assert (tmp_path / COPY).read_bytes() in locks


GREEDY = """
import os, subprocess, sys, time
if "GREEDY" in os.environ and len(sys.argv) == 1:
    child = subprocess.Popen(
        [sys.executable, __file__, "fill"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    open(os.environ["GREEDY"], "w").write(str(child.pid))
    while not os.path.exists("full"):
        time.sleep(0.01)
elif len(sys.argv) > 1:
    descriptor = os.open("filler", os.O_WRONLY | os.O_CREAT)
    open("full", "w").close()  # no byte: a file without content needs no space
    while True:
        try:
            os.write(descriptor, b"x" * 4096)
        except OSError:
            time.sleep(0.0002)
"""
"""Takes every free page of the disk, also those that other programs give back, until it is killed."""
LAST = """
  last:
    cmd: echo 1 > last.txt && python greedy.py
    outs:
    - last.txt:
        cache: false
"""


@pytest.fixture
def disk(workspace: Path, tmp_path: Path) -> Iterator[Path]:
    """Put the workspace on a disk of 1 MB; folders with a dot lie elsewhere."""
    folder, mounted = tmp_path / "disk", list[Path]()
    folder.mkdir()

    def mount(*options: str, at: Path) -> None:
        done = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"may not mount a small disk here: {done.stderr.strip()}")
        mounted.append(at)

    try:
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", at=folder)
        for name in (".dvc", ".posttrain", ".git"):
            (folder / name).mkdir()
            (workspace / name).mkdir(exist_ok=True)
            mount("--bind", str(workspace / name), at=folder / name)
        for path in workspace.iterdir():
            if not (folder / path.name).exists():
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / path.name)
        yield folder
    finally:
        for path in reversed(mounted):
            subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_url")
def test_a_disk_that_is_full_when_dvc_writes_its_lock(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / "greedy.py").write_text(GREEDY)
    with (disk / "dvc.yaml").open("a") as graph:
        graph.write(LAST)
    bring_up_to_date(str(disk), "start")
    before = (disk / "dvc.lock").read_bytes()
    bring_up_to_date(str(disk), "last")
    undisturbed = (disk / "dvc.lock").read_bytes()
    (disk / "dvc.lock").write_bytes(before)
    (disk / "last.txt").unlink()

    pid = tmp_path / "pid"
    monkeypatch.setenv("GREEDY", str(pid))
    try:
        with pytest.raises(StageFailed) as failed:
            bring_up_to_date(str(disk), "last")
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert "No space left on device" in str(failed.value)
    assert "Free space, then run again" in str(failed.value)
    assert (disk / "dvc.lock").read_bytes() != undisturbed

    monkeypatch.delenv("GREEDY")
    (disk / "filler").unlink()
    (disk / "full").unlink()
    assert "last" in changed(disk), "as a flow begins: it mends the file and asks DVC"
    assert (disk / "dvc.lock").read_bytes() == before
    bring_up_to_date(str(disk), "last")
    assert (disk / "dvc.lock").read_bytes() == undisturbed

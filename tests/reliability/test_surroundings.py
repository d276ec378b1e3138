"""A full disk, folders that may not be written, odd paths: a clear error, and nothing half-written is taken for whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.runtime.journal import ended, read
from pipelines.tracking.store import tracking_uri
from posttrain.errors import TrackingError
from tests.reliability.workspace import Workspace

SFT = ("pipelines.sft",)
Mount = Callable[[Path, int], None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mount a disk of so many KiB at a folder; a second call changes its size."""
    mounted: list[Path] = []

    def call(folder: Path, size: int) -> None:
        options = f"{'remount,' if folder in mounted else ''}size={size}k"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"may not mount a small disk here: {done.stderr.strip()}")
        mounted.append(folder)

    yield call
    for folder in dict.fromkeys(mounted):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def copy(workspace: Workspace, tmp_path: Path) -> Workspace:
    folder = tmp_path / "project"
    shutil.copytree(workspace.folder, folder, ignore=shutil.ignore_patterns(".posttrain", "sft", "align"))
    return Workspace(folder, workspace.warm)


def refused(copy: Workspace, start: str) -> None:
    """Return the step ends with one paragraph and without a result."""
    done = copy.run(*SFT)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(start)
    assert "then run" in last
    assert not (copy.folder / "models" / "sft").exists()
    assert not (copy.folder / "runs" / "sft").exists()
    assert not list(copy.folder.rglob("*partial*"))


@pytest.mark.parametrize(
    ("size", "start"),
    [(200, "error: cannot write checkpoint "), (4, "error: sft cannot continue: No space left on device")],
)
def test_a_disk_too_small_for_a_checkpoint_or_for_the_journal(
    size: int, start: str, workspace: Workspace, copy: Workspace, mount: Mount
) -> None:
    (copy.folder / ".posttrain").mkdir()
    mount(copy.folder / ".posttrain", size)
    refused(copy, start)
    mount(copy.folder / ".posttrain", 100_000)
    assert "sft: continuing run sft-" in copy.succeed(*SFT)
    assert copy.results("models/sft", "runs/sft") == workspace.results("models/sft", "runs/sft")


def test_a_disk_too_small_for_the_model(workspace: Workspace, copy: Workspace, mount: Mount) -> None:
    models = copy.folder / "models"
    shutil.move(models, copy.folder / "aside")
    models.mkdir()
    mount(models, 100_000)
    shutil.copytree(copy.folder / "aside", models, dirs_exist_ok=True)
    used = sum(-(-path.stat().st_size // 4096) * 4 for path in models.rglob("*"))
    mount(models, used + 80)
    refused(copy, "error: cannot write the model models/sft: ")
    assert ended(read(copy.state("sft") / "journal.jsonl")) == "FAILED"
    mount(models, 100_000)
    assert "resuming from the checkpoint after step" in copy.succeed(*SFT)
    assert copy.results("models/sft", "runs/sft") == workspace.results("models/sft", "runs/sft")


def test_a_workspace_that_may_not_be_written(copy: Workspace) -> None:
    """Run as nobody, in a folder of a different user."""
    if os.getuid():
        pytest.skip("only root may become another user")
    for path in (copy.folder, *copy.folder.parents[:2]):
        path.chmod(0o755)
    done = copy.run("tests.reliability.nobody", *SFT)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "error: sft cannot continue: Permission denied" in done.stderr
    assert "give this user the right" in done.stderr


def test_an_odd_and_very_long_path_changes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "模型 проект ü" / "50% #1 &=" / ("long-" * 40)
    shutil.copytree(workspace.folder, folder, ignore=shutil.ignore_patterns(".posttrain", "sft", "align"))
    odd = Workspace(folder, workspace.warm)
    odd.succeed(*SFT)
    assert odd.results("models/sft", "runs/sft") == workspace.results("models/sft", "runs/sft")
    assert odd.succeed("pipelines.commands.sync").startswith("5 runs are up to date in sqlite:///")
    assert (folder / "mlflow.db").is_file()


def test_a_path_that_no_database_address_can_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match=r"contains '\?'"):
        tracking_uri(tmp_path / "really?")

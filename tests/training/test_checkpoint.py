"""Checkpoints are whole or passed over, and the newest whole one is never thrown away."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch

from posttrain.errors import CheckpointError, ConfigError
from posttrain.training.checkpoint import Checkpoints, _manifest
from posttrain.training.randomness import random_state, set_random_state
from posttrain.training.sharded_checkpoint import file_digest


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_are_kept_and_the_state_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4, 6):
        checkpoints.save(step, {"weight": torch.full((3,), float(step)), "list": [1, 2.5, "x"]})
    assert names(tmp_path) == ["step-00000004", "step-00000006"]
    step, state = checkpoints.latest() or (0, {})
    assert step == 6
    assert state["weight"].tolist() == [6.0] * 3
    assert state["list"] == [1, 2.5, "x"]


def test_none_yet(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nothing").latest() is None


@pytest.mark.parametrize("damage", ["cut", "flip", "no manifest", "no state", "garbled manifest"])
def test_a_damaged_one_is_named_and_the_one_before_it_taken(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"value": step})
    state, manifest = tmp_path / "step-00000002" / "state.pt", tmp_path / "step-00000002" / "manifest.json"
    content = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "no state":
        state.unlink()
    else:
        manifest.write_text('{"step": 2, "sha')
    assert checkpoints.latest() == (1, {"value": 1})
    assert "checkpoint step-00000002 is damaged" in capsys.readouterr().err


def test_a_half_written_one_has_no_name_to_be_found_by(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"value": 1})
    partial = tmp_path / "partial-00000002"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    assert checkpoints.latest() == (1, {"value": 1})
    checkpoints.save(2, {"value": 2})
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_torn_later_one_does_not_push_out_the_good_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(10, {"value": 10})
    (tmp_path / "step-00000020").mkdir()
    assert checkpoints.latest() == (10, {"value": 10})
    checkpoints.save(12, {"value": 12})
    assert names(tmp_path) == ["step-00000012"]
    assert checkpoints.latest() == (12, {"value": 12})


def test_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").write_text("a file where a folder must go")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        Checkpoints(tmp_path).save(3, {"value": 3})


def test_a_folder_may_be_text_and_what_keeps_nothing_is_refused(tmp_path: Path) -> None:
    assert Checkpoints(str(tmp_path)).save(1, {}).parent == tmp_path
    with pytest.raises(ConfigError, match=r"keep = 0; .* at least 1 checkpoint"):
        Checkpoints(tmp_path, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*: .* Not a directory"):
        Checkpoints(tmp_path / "file" / "inside").save(1, {})


def test_a_checkpoint_of_a_gpu_is_read_on_a_machine_without_one(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path).save(1, {"weight": torch.tensor([1.0, 2.0])})
    moved = BytesIO()
    with zipfile.ZipFile(folder / "state.pt") as given, zipfile.ZipFile(moved, "w") as written:
        for name in given.namelist():
            # the storage's device in the pickle, as a length and a text
            written.writestr(name, given.read(name).replace(b"\x03\0\0\0cpu", b"\x06\0\0\0cuda:0"))
    (folder / "state.pt").write_bytes(moved.getvalue())
    (folder / "manifest.json").write_text(json.dumps(_manifest(1, file_digest(folder / "state.pt"))))
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(folder / "state.pt", weights_only=True)
    step, state = Checkpoints(tmp_path).latest() or (0, {})
    assert (step, state["weight"].tolist(), state["weight"].device.type) == (1, [1.0, 2.0], "cpu")


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_random_states_of_two_devices_return_on_any_number(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state() | {"cuda": [torch.tensor([7], dtype=torch.uint8), torch.tensor([8], dtype=torch.uint8)]}
    restored: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda saved, device: restored.update({device: int(saved)}))
    set_random_state(state)
    assert restored == ({0: 7, 1: 8} if devices > 1 else {0: 7})

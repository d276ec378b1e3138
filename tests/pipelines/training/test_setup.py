"""How many threads a process takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.training.setup import _threads
from posttrain.models.folders import save_model
from posttrain.models.tiny import TinyShape, tiny_model


def saved(folder: Path, shape: TinyShape) -> Path:
    save_model(*tiny_model(shape, 0), folder, "# A model\n")
    return folder


def test_auto_is_one_thread_for_a_small_model_and_a_share_of_the_cores_for_a_larger_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = saved(tmp_path / "small", TinyShape())
    large = saved(tmp_path / "large", TinyShape(hidden_size=256, intermediate_size=768))
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (_threads(small), _threads(large)) == (1, cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert _threads(large) == 1

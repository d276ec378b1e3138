"""Set-up of a training process: threads, devices, and equal inputs on all ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.training.setup import GROUP_SECONDS, _check_device, _threads, check_keys
from posttrain.errors import ConfigError
from posttrain.models.folders import save_model
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.rollouts.vllm.local import START_SECONDS


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


def test_a_named_device_that_torch_does_not_see_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"CUDA_VISIBLE_DEVICES = GPU-7, but PyTorch .* sees no CUDA device.*nvidia-smi"
    ):
        _check_device("cpu", "GPU-7")
    for kind, visible in (("cuda", "GPU-7"), ("cpu", ""), ("cpu", " "), ("cpu", "-1")):
        _check_device(kind, visible)


def test_ranks_wait_for_a_server_that_rank_0_starts() -> None:
    """Ten minutes, the default of NCCL, are less than a vLLM server may take."""
    assert GROUP_SECONDS >= 2 * START_SECONDS


def test_ranks_with_other_inputs_are_refused_by_number() -> None:
    check_keys(["a"])
    check_keys(["a", "a"])
    with pytest.raises(ConfigError, match="rank 1, 3 has other parameters, inputs or arguments than rank 0"):
        check_keys(["a", "b", "a", "c"])

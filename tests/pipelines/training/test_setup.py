"""Set-up of a training process: threads, devices, and equal inputs on all ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.config.schema import ComputeParams
from pipelines.training.setup import GROUP_SECONDS, _check_device, _threads, accelerator, check_keys
from posttrain.errors import ConfigError
from posttrain.models.folders import save_model
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.rollouts.vllm.local import START_SECONDS

CONTEXT: Any = SimpleNamespace(key="k", name="sft", records=True)
COMPUTE = ComputeParams(micro_batch_tokens=64, bf16=False, threads=1)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    yield saved(tmp_path / "model", TinyShape())
    torch.backends.cuda.enable_cudnn_sdp(True)


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


def test_a_missing_device_and_processes_with_other_keys_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.distributed.gather_texts", lambda _, key: [key, "other"])
    with pytest.raises(ConfigError, match="rank 1 has other parameters"):
        accelerator(CONTEXT, COMPUTE, 0, model)
    if not torch.accelerator.is_available():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7")
        with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES = GPU-7, but PyTorch"):
            accelerator(CONTEXT, COMPUTE, 0, model)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_torch_does_not_see_is_announced(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for driver, visible, announced in ((".", None, True), (".", "", False), ("none", None, False)):
        monkeypatch.setattr("pipelines.training.setup.NVIDIA", Path(driver))
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        accelerator(CONTEXT, COMPUTE, 0, model)
        assert ("runs on the CPU: this machine has an NVIDIA driver" in capsys.readouterr().out) == announced


@pytest.mark.parametrize("bf16", [False, True])
def test_a_device_in_float32_is_announced_and_ranks_are_patient(
    bf16: bool,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {}

    def on_a_device(**options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(num_processes=1, device=torch.device("meta"))

    monkeypatch.setattr("accelerate.Accelerator", on_a_device)
    accelerator(CONTEXT, COMPUTE.model_copy(update={"bf16": bf16}), 0, model)
    notice = "meta computes in float32; bf16: true in its `compute` section is faster"
    assert (notice in "".join(capsys.readouterr())) != bf16
    assert [handler.timeout.total_seconds() for handler in given["kwargs_handlers"]] == [GROUP_SECONDS]

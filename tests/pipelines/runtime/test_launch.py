"""A configuration of several processes is checked before any of them starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.runtime.launch import check_device, check_hosts, configuration, processes
from posttrain.errors import ConfigError

TWO_HOSTS = (
    "num_machines: 2\nmachine_rank: 0\nmain_process_ip: 10.0.0.1\nmain_process_port: 29500\nrdzv_backend: static\n"
)


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ("main_process_port: 29500", "main_process_port: 0", "main_process_port = 0 with num_machines = 2"),
        ("main_process_port: 29500\n", "", "main_process_port = None with num_machines = 2"),
        ("main_process_ip: 10.0.0.1\n", "", "no main_process_ip"),
        ("rdzv_backend: static", "rdzv_backend: c10d", "rdzv_backend = 'c10d' gives ranks in the order of arrival"),
    ],
)
def test_hosts_that_could_not_meet_are_refused(written: str, instead: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts.yaml"
    path.write_text(TWO_HOSTS)
    check_hosts(path)
    path.write_text(TWO_HOSTS.replace(written, instead))
    with pytest.raises(ConfigError, match=message):
        check_hosts(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "= .*: no such file, so the processes cannot be started"),
        ("# Title\n**words**", r"names no configuration of accelerate: .*not valid YAML, line 2"),
        ("sft: {epochs: 2}", r"names .*, where num_processes = None: must be a whole number of at least 1"),
        ("num_processes: two", "names .*, where num_processes = 'two'"),
    ],
)
def test_a_file_that_is_no_configuration_names_the_variable(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(
        ConfigError, match=f"^POSTTRAIN_ACCELERATE {message}.*Choose a file in infra/accelerate, or make one"
    ):
        processes(configuration({"POSTTRAIN_ACCELERATE": str(path)}))


def test_one_host_takes_a_free_port(root: Path) -> None:
    for path in sorted((root / "infra" / "accelerate").glob("*.yaml")):
        check_hosts(path)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_a_configuration_for_gpus_without_one_is_refused(root: Path) -> None:
    files = root / "infra" / "accelerate"
    for path in sorted(files.glob("*_cpu.yaml")):
        check_device(path)
    gpus = sorted(files.glob("*_gpu.yaml"))
    assert len(gpus) == 2
    for path in gpus:
        with pytest.raises(
            ConfigError, match=r"for GPUs \(use_cpu: false\), but PyTorch .* sees none.*fsdp2_cpu\.yaml"
        ):
            check_device(path)


def test_more_processes_than_gpus_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    path = root / "infra" / "accelerate" / "fsdp2_gpu.yaml"
    check_device(path)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    words = r"2 processes on this host, each with its own GPU, and PyTorch sees 1 \(CUDA_VISIBLE_DEVICES = 0\).*num_processes"
    with pytest.raises(ConfigError, match=words):
        check_device(path)
    check_device(root / "infra" / "accelerate" / "fsdp2_cpu.yaml")

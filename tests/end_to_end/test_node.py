"""One training stage over two clones that share only a DVC remote and the network: recorded once, where rank 0 runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.tracking.lockfile import read_lock
from posttrain.network import free_port
from tests.end_to_end.conftest import TINY, Clone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
STAGE = "align@grpo-0"


def log(host: Clone) -> Path:
    return host.root.parent / "log.txt"


def start(host: Clone, *command: str) -> subprocess.Popen[bytes]:
    with log(host).open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=host.root, env=host.environment(POSTTRAIN_FOLLOWER="1"), stdout=file, stderr=file,
        )  # fmt: skip


def test_a_stage_over_two_hosts_is_recorded_and_pushed_by_rank_0(
    new_clone: Callable[[], Clone], tmp_path: Path
) -> None:
    clone = new_clone()
    store = tmp_path / "store"
    clone.run("dvc", "remote", "add", "-q", "--force", "--default", "store", str(store))
    clone.configure(str(TINY), "project.algorithms=[dpo, grpo]")
    clone.repro("reward_readers", POSTTRAIN_FOLLOWER="1")
    clone.run("dvc", "push", "-q")
    config = tmp_path / "one_process.yaml"
    text = (clone.root / "infra" / "accelerate" / "ddp_cpu.yaml").read_text()
    config.write_text(text.replace("num_processes: 2", "num_processes: 1"))

    hosts = [replace(clone, root=tmp_path / name / "project", warm=None) for name in ("one", "two")]
    for host in hosts:
        shutil.copytree(clone.root, host.root, symlinks=True)
        for made in (".dvc/cache", "models", "runs", "data/valid", ".posttrain"):
            shutil.rmtree(host.root / made)
    port = str(free_port())
    command = ("flows.node", STAGE, "--hosts", "2", "--address", "127.0.0.1", "--port", port, "--config", str(config))
    running = [start(host, *command, "--rank", str(rank)) for rank, host in enumerate(hosts)]
    assert [process.wait(600) for process in running] == [0, 0], [log(host).read_text()[-3000:] for host in hosts]

    first, second = hosts
    assert "up to date" in first.run("dvc", "status", STAGE).stdout
    assert (second.root / "dvc.lock").read_text() == (clone.root / "dvc.lock").read_text()
    assert not (second.root / "models" / "align").exists()
    assert not (second.root / "runs" / "align").exists()
    (second.root / "dvc.lock").write_text((first.root / "dvc.lock").read_text())
    second.run("dvc", "pull", "-q", STAGE)
    for out in read_lock(first.root)[STAGE]["outs"]:
        assert (second.root / out["path"]).exists()

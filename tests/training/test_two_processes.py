"""Two processes give the loss, metrics, gradient and samples of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from posttrain.network import free_port
from tests.reliability.workspace import CLIENT, Warm
from tests.training.two_processes import NAMES, results

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def together(root: Path, extra: dict[str, str], *command: str, warm: Warm | None = None) -> list[str]:
    """Run a module in two processes that train together on the CPU; return the output of each.

    Args:
        warm: the processes are its forks, which need no seconds for their imports, and have no exit of the interpreter.
    """
    environment = os.environ | extra
    environment |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}
    start = ["-m"] if warm is None else ["-c", CLIENT]
    environment |= {} if warm is None else {"POSTTRAIN_WARM": str(warm.socket)}
    processes = [
        subprocess.Popen(
            [sys.executable, *start, *command],
            cwd=root,
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for r in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], outputs
    return outputs


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("sharding", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_agree_with_one(sharding: dict[str, str], root: Path, tmp_path: Path, warm: Warm) -> None:
    outputs = together(root, sharding, "tests.training.two_processes", str(tmp_path / "two.pt"), warm=warm)
    # both refuse a broken batch; neither waits for the other for ever
    assert all("refused" in output for output in outputs)

    two, one = torch.load(tmp_path / "two.pt", weights_only=False), results(Accelerator())
    assert two["answers"] == one["answers"]
    assert two["tokens_sampled"] == one["tokens_sampled"]
    assert two["ahead"] == one["ahead"]
    assert "router/load_max" in one["moe"][0]
    assert two["judged"][0] == two["judged"][1]
    assert [(state["rank"], state["x"].tolist()) for state in two["state"]] == [(0, [0, 1, 2])] * 2
    assert two["texts"] == ["key 0", "key 1"]
    assert one["texts"] == ["key 0"]
    assert two["choices"] == [{"both": 10, "of 0": 1, "of 1": 1}] * 2
    assert two["resumed"].keys() == one["resumed"].keys()
    assert all(torch.allclose(two["resumed"][name], value, atol=1e-8) for name, value in one["resumed"].items())
    for name in NAMES:
        (metrics, gradient), (alone, expected) = two[name], one[name]
        assert metrics == pytest.approx(alone, abs=1e-9, rel=1e-9), name
        for parameter, value in expected.items():
            assert torch.allclose(gradient[parameter], value, atol=1e-10), (name, parameter)

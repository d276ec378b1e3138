"""Time the weights' way from the trainer's GPU to a process that samples, for benchmarks/gpu.py.

`ipc` copies them on one GPU, and `nccl` brings them to a second one. On a CPU the same code maps storages and uses Gloo. The receiving
process loads them by vLLM's worker extension into a transformers model, and a probe proves every transfer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script on a bare GPU box

import torch
from transformers import Qwen3ForCausalLM

from benchmarks.gpu_cases import SHAPES
from benchmarks.transfer import Process, serve, transferred
from posttrain.rollouts.vllm.published import Published

Numbers = dict[str, Any]


def transfers(
    device: torch.device, shape: str, repeats: int, attempted: Callable[[Callable[[], Numbers]], Numbers]
) -> dict[str, Numbers]:
    """Return the numbers of each way, or the reason to skip it.

    Args:
        attempted: returns the numbers of one way, or its error.
    """
    lm, found = model(shape, device), {}
    for way in ("ipc", "nccl"):
        if way == "nccl" and device.type == "cuda" and torch.cuda.device_count() < 2:
            found[way] = {"skipped": "one GPU"}
            continue
        other = f"cuda:{int(way == 'nccl')}" if device.type == "cuda" else "cpu"
        found[way] = attempted(lambda: transfer(lm, way, shape, other, repeats))  # noqa: B023
    return found


def transfer(lm: Qwen3ForCausalLM, way: str, shape: str, other: str, repeats: int) -> Numbers:
    """Return the fastest wall seconds to publish, load and prove all weights in bfloat16 on the device `other`."""
    process = Process([sys.executable, "-P", __file__, shape, other])
    published = Published(lm, torch.bfloat16, way)
    try:
        # the first transfer claims memory and connects
        parts = [transferred(lm, published, process, version, wall=True) for version in range(repeats + 1)][1:]
    finally:
        published.close()
        process.close()
    return {part: min(each[part] for each in parts) for part in parts[0]}


def table(found: dict[str, Numbers]) -> list[str]:
    """Return the numbers as lines of Markdown."""
    lines = [
        "",
        "| weights by | MiB | publish | load | probe | seconds | GB/s | largest difference |",
        "|---|" + "---|" * 7,
    ]
    for name, part in found.items():
        if reason := part.get("skipped", part.get("error")):
            lines.append(f"| {name} | {reason} | | | | | | |")
            continue
        seconds = " | ".join(f"{part[key]:.3f}" for key in ("publish", "load", "probe", "total"))
        rate = part["MiB"] * 2**20 / 1e9 / (part["publish"] + part["load"])
        lines.append(f"| {name} | {part['MiB']:.1f} | {seconds} | {rate:.2f} | {part['gap']:.2g} |")
    return lines


def model(shape: str, device: torch.device) -> Qwen3ForCausalLM:
    """Return a model with random weights in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(SHAPES[shape].config()).to(torch.bfloat16).eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = torch.device(sys.argv[2])
    if where.type == "cuda":
        torch.cuda.set_device(where)
    serve(model(sys.argv[1], where))

"""Lines of `posttrain plan` about vLLM servers that share the trainer's GPU: their part of its memory, or that it is too small."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.config.params import Params
from pipelines.config.schema import OnPolicyBudget
from pipelines.training.planned_memory import memory_next_to_server
from posttrain.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class ServerLine:
    """A line of the plan; `fits` is False if the server could not start."""

    text: str
    fits: bool = True


def server_lines(params: Params, config: Any, device: str, limit: int) -> Iterator[ServerLine]:
    """Yield a line for each algorithm that samples by a server on the trainer's GPU.

    Args:
        config: the model's configuration.
        limit: bytes of the device.
    """
    if device == "cpu" or os.environ.get("POSTTRAIN_VLLM_URLS") or os.environ.get("POSTTRAIN_VLLM_DEVICES"):
        return
    for name in params.project.algorithms:
        budget = params.budget(name)
        if isinstance(budget, OnPolicyBudget) and budget.rollouts.engine == "vllm":
            yield _line(params, name, budget.rollouts.staleness, config, device, limit)


def _line(params: Params, name: str, staleness: int, config: Any, device: str, limit: int) -> ServerLine:
    from posttrain.planning import server_share, sizes

    sleeps = os.environ.get("POSTTRAIN_VLLM_SLEEP", "0") not in ("", "0")
    snapshots = 1 + staleness if os.environ.get("POSTTRAIN_VLLM_TRANSFER") == "ipc" else 0
    try:
        share = server_share(limit, memory_next_to_server(params, name, config, device, snapshots, sleeps))
    except ConfigError as error:
        return ServerLine(f"align@{name} would stop: {error}", fits=False)
    weights = sizes(config).parameters * (2 if params.align.compute.bf16 else 4)
    line = (
        f"align@{name}: a vLLM server on the same GPU gets {share:.0%} of its memory, {share * limit / GIB:.1f} GiB, of which its weights"
        f" take {weights / GIB:.1f} GiB"
    )
    if weights < share * limit:
        return ServerLine(line + ("; it sleeps during updates" if sleeps else ""))
    return ServerLine(
        f"{line}, so the server would not start; give it other GPUs in POSTTRAIN_VLLM_DEVICES, let it sleep during updates"
        " (POSTTRAIN_VLLM_SLEEP=1), or set lora",
        fits=False,
    )

"""Tensor parallelism: all processes of a stage hold a part of each layer, and compute the same rows together (1909.08053).

The split is that of transformers' plan for the architecture. A model is loaded whole in main memory, then each process keeps its part.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> print(refusal(model, 2).partition("; ")[0])
    POSTTRAIN_TENSOR_PARALLEL = 2: the model's 2 heads, 1 of them with keys and values, cannot be divided evenly
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from posttrain.combinations import Setup, refusals, require
from posttrain.errors import ConfigError
from posttrain.models.routing import routers_of
from posttrain.settings import TENSOR_PARALLEL, row_processes


def refusal(model: PreTrainedModel, processes: int) -> str | None:
    """Return why the model cannot be split over `processes`, None if it can."""
    text = model.config.get_text_config()
    if not model.supports_tp_plan or not getattr(model, "tp_plan", None):
        return (
            f"{TENSOR_PARALLEL} = {processes}: transformers has no plan for {type(model).__name__}; remove the variable and use an FSDP2"
            " configuration of infra/accelerate"
        )
    heads = int(text.num_attention_heads)
    learns = {parameter.requires_grad for parameter in model.parameters()}
    found = refusals(
        Setup(
            processes,
            layers=processes,
            lora=len(learns) > 1,
            experts=bool(routers_of(model)),
            heads=heads,
            key_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        )
    )
    return found[0] if found else None


def split_layers(module: nn.Module, accelerator: Accelerator) -> None:
    """Replace the weights of every language model in `module` by this process's parts. All processes must call it.

    Raises:
        ConfigError: one of them cannot be split, or another way of sharing work is set as well.
    """
    processes = accelerator.num_processes
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    require(Setup(processes, layers=processes, context=row_processes(), fsdp=2 * fsdp))
    roots = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    inner = {id(part) for root in roots for part in root.modules() if part is not root}
    for model in (root for root in roots if id(root) not in inner):
        if reason := refusal(model, processes):
            raise ConfigError(reason)
        _split(model.to(accelerator.device), _mesh(accelerator.device.type, processes))
    module.to(accelerator.device)


def _split(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    distributed: Any = model
    head, embeddings = distributed.get_output_embeddings(), distributed.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:
        # the plan names both
        head.weight = nn.Parameter(embeddings.weight.detach(), requires_grad=embeddings.weight.requires_grad)
    plan, _, _ = distributed._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size(), tp_plan="auto"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        apply_tensor_parallelism(model, mesh, plan)
    distributed.tie_weights()


@cache
def _mesh(kind: str, processes: int) -> DeviceMesh:
    return init_device_mesh(kind, (processes,), mesh_dim_names=("tp",))

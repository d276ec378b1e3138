"""Compute the memory of training from params.yaml: for `posttrain plan`, and for the share of a vLLM server next to the trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.config.params import Params
from pipelines.config.schema import LoraParams, OnPolicyBudget, OptimizerParams, RolloutParams, TrainingComputeParams
from pipelines.runtime.launch import configuration, processes, sharing_processes
from posttrain.algorithms import OnPolicy

if TYPE_CHECKING:
    from posttrain.planning import Memory, Sizes


def training_options(
    config: Any, compute: TrainingComputeParams, lora: LoraParams | None, optimizer: OptimizerParams, device: str
) -> dict[str, Any]:
    """Return the options of `posttrain.planning.training` other than the sizes and the number of models.

    Args:
        config: the model's configuration, of which the adapter is made without weights.
        device: kind of the device, such as cuda.
    """
    from posttrain.models.context import context_size

    return {
        **_adapter(config, lora),
        "device": device,
        "moment_bits": optimizer.moment_bits,
        "offloaded": optimizer.offload,
        "bf16": compute.bf16,
        "recomputes": compute.gradient_checkpointing,
        "processes": sharing_processes(configuration()),
        "context": context_size(processes(configuration())),
    }


def saving(options: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the options that save memory already."""
    plain = {
        "adapter": None,
        "quantised": 0,
        "moment_bits": 32,
        "offloaded": False,
        "recomputes": False,
        "processes": 1,
    }
    return frozenset(name for name, value in plain.items() if options[name] != value)


def _adapter(config: Any, lora: LoraParams | None) -> dict[str, Any]:
    """Return the number of the adapter's parameters, None if all weights are trained, and of the base's parameters in 4 bits."""
    if lora is None:
        return {"adapter": None, "quantised": 0}
    from posttrain.models.lora import adapter_parameters

    return dict(zip(("adapter", "quantised"), adapter_parameters(config, lora.settings()), strict=True))


def models_held(params: Params, name: str) -> dict[str, Any]:
    """Return how many models an on-policy algorithm trains, and how many frozen ones its device holds.

    With an adapter, the frozen base model is also the reference policy.
    """
    spec = params.algorithm(name)
    separate = isinstance(spec, OnPolicy) and spec.has_critic and spec.critic == "separate"
    rewards = params.algorithms[name].rewards or {}
    scored = any(params.rewards[source].function == "reward_model" for source in rewards)
    return {"trained": 1 + int(separate), "frozen": int(scored) + int(params.align.lora is None)}


def memory_next_to_server(
    params: Params, name: str, config: Any, device: str, snapshots: int = 0, sleeps: bool = False
) -> Memory:
    """Return the memory of an on-policy algorithm that a vLLM server on its GPU must leave free.

    Next to a server that sleeps during an update these are weights and the optimiser's state.

    Args:
        snapshots: copies of the trained weights on the GPU, from which the server takes them.
    """
    from posttrain.planning import sizes, training

    compute, model = params.align.compute, sizes(config)
    options = training_options(config, compute, params.align.lora, params.budget(name).optimizer, device)
    memory = training(model, compute.micro_batch_tokens, **(options | models_held(params, name)))
    if sleeps:
        memory = replace(memory, activations=0, cache=0, logits=0, temporary=0)
    return replace(memory, weights=memory.weights + snapshots * _copy_bytes(model, options))


def snapshots(rollouts: RolloutParams) -> int:
    """Return how many snapshots of the weights a process that samples ahead needs, so that the trainer never waits for one.

    If answers are interrupted, each step's weights go on with all answers that were begun, and begin others.
    """
    return rollouts.staleness * (2 if rollouts.interrupt else 1)


def published_bytes(params: Params, name: str, model: Sizes, options: Mapping[str, Any]) -> int:
    """Return the bytes on the trainer's device of the copies from which vLLM servers take its weights, as the environment has it.

    One copy is being read, and one more waits for each step of staleness.

    Args:
        options: those of `training_options`.
    """
    budget, kind = params.budget(name), os.environ.get("POSTTRAIN_VLLM_TRANSFER", "").partition(":")[0]
    if not isinstance(budget, OnPolicyBudget) or budget.rollouts.engine != "vllm":
        return 0
    in_main_memory = kind in ("memory", "stream")
    if kind not in ("ipc", "nccl") and not (in_main_memory and options["device"] == "cpu"):
        return 0
    below = 4 * _numbers(model) if _adapter_travels(options) and options["device"] == "cpu" else 0
    return (1 + budget.rollouts.staleness) * _copy_bytes(model, options) + below


def _copy_bytes(model: Sizes, options: Mapping[str, Any]) -> int:
    """Return the bytes of a copy of the trained weights for vLLM servers; an adapter travels in float32."""
    if _adapter_travels(options):
        return int(4 * options["adapter"])
    return (2 if options["bf16"] else 4) * _numbers(model)


def _adapter_travels(options: Mapping[str, Any]) -> bool:
    """Return False if servers get whole weights: what is below an adapter in 4 bits, or split over processes, is joined with it."""
    return options["adapter"] is not None and not options["quantised"] and options["processes"] == 1


def _numbers(model: Sizes) -> int:
    """Return the numbers of all weights as servers get them: a tied head travels, too."""
    return model.parameters + model.tied * model.vocabulary * model.hidden

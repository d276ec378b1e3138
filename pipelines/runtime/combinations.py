"""Find settings that a stage's processes cannot combine, before they start: params.yaml, environment and configuration of processes.

Neither torch nor a model is loaded. Of the model only config.json is read; one that is not here yet is not looked into.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.config.params import Params
from pipelines.config.schema import LoraParams, OnPolicyBudget, OptimizerParams, TrainingComputeParams
from pipelines.config.yaml_files import read_yaml
from posttrain.algorithms import OnPolicy
from posttrain.combinations import Setup, refusals
from posttrain.settings import layer_processes, row_processes

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names by which configurations of models count the experts that a router chooses from."""


def stage_refusals(root: Path, params: Params, stage: str, algorithm: str | None, path: Path | None) -> list[str]:
    """Return why the processes of a stage cannot run with these settings; empty if they can.

    Args:
        root: folder of the project, whose models are looked into.
        algorithm: of the stage `align`.
        path: the configuration of processes, None for one process.

    Raises:
        ConfigError: the environment names no number of processes.
    """
    shared = _sharing(path)
    if stage == "evaluate" or (algorithm is not None and algorithm not in params.algorithms):
        return refusals(Setup(**shared))
    model = _model_facts(root, params, "base" if algorithm is None else params.start(algorithm))
    return refusals(Setup(**shared, **model, **_settings(params, stage, algorithm)))


def all_refusals(root: Path, params: Params, path: Path | None) -> list[str]:
    """Return the refusals of all stages that train, each once, with the names of the stages."""
    stages: list[tuple[str, str | None]] = [("sft", None)]
    if params.reward.enabled and params.reward.source is None:
        stages.append(("reward", None))
    stages += [("align", name) for name in params.project.algorithms]
    found: dict[str, list[str]] = {}
    for stage, algorithm in stages:
        for message in stage_refusals(root, params, stage, algorithm, path):
            found.setdefault(message, []).append(f"{stage}@{algorithm}" if algorithm else stage)
    return [f"{', '.join(names)}: {message}" for message, names in found.items()]


def _sharing(path: Path | None) -> dict[str, Any]:
    """Return how the processes share work, as environment and configuration name it."""
    tree: Any = {} if path is None else read_yaml(path)
    tree = tree if isinstance(tree, Mapping) else {}
    options = tree.get("fsdp_config")
    version = int(options.get("fsdp_version") or 1) if isinstance(options, Mapping) else 1
    return {
        "processes": int(tree.get("num_processes") or 1),
        "layers": layer_processes(),
        "context": row_processes(),
        "fsdp": version if tree.get("distributed_type") == "FSDP" else 0,
    }


def _settings(params: Params, stage: str, algorithm: str | None) -> dict[str, Any]:
    """Return the settings of a stage that trains."""
    if algorithm is None:
        section = params.sft if stage == "sft" else params.reward
        return _training(section.optimizer, section.compute, section.lora)
    budget, own = params.budget(algorithm), params.align
    found = _training(budget.optimizer, own.compute, own.lora)
    found["best_checkpoint"] = own.best_checkpoint is not None
    if isinstance(params.algorithm(algorithm), OnPolicy) and isinstance(budget, OnPolicyBudget):
        found |= {"engine": budget.rollouts.engine, "staleness": budget.rollouts.staleness}
    return found


def _training(optimizer: OptimizerParams, compute: TrainingComputeParams, lora: LoraParams | None) -> dict[str, Any]:
    return {
        "moment_bits": optimizer.moment_bits,
        "offload": optimizer.offload,
        "compile": compute.compile,
        "lora": lora is not None,
    }


def _model_facts(root: Path, params: Params, name: str) -> dict[str, Any]:
    """Return heads and experts of the model of a stage: of its folder, or else of the configured model."""
    source = params.model.source
    if source == "tiny":
        tiny = params.model.tiny
        return {"heads": tiny.heads, "key_heads": tiny.kv_heads, "experts": tiny.experts > 0}
    found = next((tree for tree in _configurations(root / "models" / name, root / source) if tree), {})
    text = found.get("text_config")
    values = text if isinstance(text, Mapping) else found
    heads = _count(values.get("num_attention_heads"))
    return {
        "heads": heads,
        "key_heads": _count(values.get("num_key_value_heads")) or heads,
        "experts": any(_count(values.get(name)) > 1 for name in EXPERT_COUNTS),
    }


def _configurations(*folders: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the object of each config.json, empty if there is none."""
    for folder in folders:
        try:
            tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            tree = {}
        yield tree if isinstance(tree, Mapping) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

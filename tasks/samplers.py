"""Lease the devices on which an on-policy stage starts a vLLM server, or a sampling process, next to its trainer.

The variables name the same devices for every stage of a flow. So no stage trains on them, and stages that sample wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipelines.config.params import load_params
from posttrain.algorithms import OnPolicy
from posttrain.errors import ConfigError
from tasks.slots import Slot, has_several_processes, machine_slots, named_samplers


def stage_slots(root: Path, stage: str, environ: Mapping[str, str] = os.environ) -> list[Slot]:
    """Return the slots of this machine for one stage; each holds the samplers' devices as well if the stage samples.

    Args:
        root: project with the parameters of the stage.
        stage: name of the node, e.g. `align@grpo-0`.
    """
    holds = bool(named_samplers(environ)) and _samples(root, stage)
    return machine_slots(environ, has_several_processes(stage), holds)


def _samples(root: Path, stage: str) -> bool:
    """Return True if the stage trains an on-policy algorithm."""
    kind, _, instance = stage.partition("@")
    if kind != "align":
        return False
    try:
        spec = load_params(root / "params.yaml").algorithm(instance.rpartition("-")[0])
    except ConfigError:
        return True  # the stage itself reports it
    return isinstance(spec, OnPolicy)

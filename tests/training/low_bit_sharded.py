"""Run by two processes under FSDP2: train with moments in 8 bits, write a checkpoint, and go on from it and from that of one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from posttrain.models.policy import Policy
from posttrain.models.tiny import TinyShape
from posttrain.settings import OptimizerSettings
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.supervised import Example, SupervisedObjective
from posttrain.training.trainer import Trainer
from tests.models import small

# 259 embeddings of 256 numbers: whole blocks in one process, and uneven parts in two
SHAPE = TinyShape(hidden_size=256, intermediate_size=64, layers=1, heads=4, kv_heads=2, max_length=64)
SETTINGS = OptimizerSettings(1e-2, weight_decay=0.1, moment_bits=8)
ROWS = [Example(tokens) for tokens in small.rows(6)]


def trainer_of(accelerator: Accelerator, settings: OptimizerSettings = SETTINGS) -> Trainer[Any]:
    policy = Policy(small.language_model(shape=SHAPE))
    return Trainer(policy, settings, total_steps=3, micro_batch_tokens=40, accelerator=accelerator)


def trained(trainer: Trainer[Any], updates: int) -> dict[str, torch.Tensor]:
    for _ in range(updates):
        trainer.update(ROWS, SupervisedObjective())
    return {name: value.clone() for name, value in trainer.weights().items()}


def resumed(accelerator: Accelerator, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights after the third update, from the checkpoint after the second."""
    trainer = trainer_of(accelerator)
    _, state = Checkpoints(folder).latest() or (0, {})
    trainer.load_state_dict(state["trainer"])
    return trained(trainer, 1)


def results(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    trainer = trainer_of(accelerator)
    trained(trainer, 2)
    moments = [entry["exp_avg"] for entry in trainer.optimizer.state.values()]
    local = [value.to_local() if isinstance(value, DTensor) else value for value in moments]
    checkpoints = Checkpoints(folder, writes=accelerator.is_main_process)
    checkpoints.save(2, {"trainer": trainer.state_dict()})
    checkpoints.wait()
    return {"weights": trained(trainer, 1), "in 8 bits": sum(hasattr(value, "codes") for value in local)}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    found = results(accelerator, Path(folder) / "two")
    found["resumed"] = resumed(accelerator, Path(folder) / "two")
    found["from one"] = resumed(accelerator, Path(folder) / "one")
    torch.save(found, Path(folder) / f"{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1])

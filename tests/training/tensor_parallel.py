"""Run by two processes that split a model by transformers' plan: train and sample it, and compare with the model that is not split."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from posttrain.distributed import gather_all, round_robin
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import TENSOR_PARALLEL, OptimizerSettings
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.sharding import place
from posttrain.training.supervised import Example, SupervisedObjective
from posttrain.training.trainer import Trainer
from tests.models import small

STAGE_ROWS = [Example(tokens) for tokens in small.rows(9, vocabulary=40)]
REQUESTS = [Request((5, 6, 7), ((1,), (2,), (3,))), Request((9, 8), ((4,),))]


def whole(weight: Tensor) -> Tensor:
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()


def trained(lm: Any) -> tuple[list[dict[str, float]], dict[str, Tensor], list[Any]]:
    """Return the metrics of three updates, the first one's gradient and the last weights, and samples of the trained model."""
    policy = Policy(lm)
    assert policy.packs
    trainer = Trainer(policy, OptimizerSettings(1e-3, epsilon=1e-3), total_steps=3, micro_batch_tokens=20)
    found: dict[str, Tensor] = {}
    step = trainer.optimizer.step

    def noted(*args: Any, **kwargs: Any) -> Any:
        for name, parameter in policy.named_parameters():
            if parameter.grad is not None:
                found.setdefault(f"gradient of {name}", whole(parameter.grad))
        return step(*args, **kwargs)

    trainer.optimizer.step = noted
    rows = [Example(tokens) for tokens in small.rows(9)]
    metrics = [trainer.update(rows, SupervisedObjective()) for _ in range(3)]
    found |= {name: whole(weight) for name, weight in lm.state_dict().items()}
    answers = NativeEngine(lm, small.EOS).sample(REQUESTS, SamplingSettings(8, 1.0))
    return metrics, found, [answer.tokens for group in answers for answer in group]


def stage(folder: Path) -> None:
    """Train as a stage does: the environment names the number of processes, and the weights of a whole model are split.

    Write metrics, the weights after three updates, a checkpoint after two of them, and answers to a list that processes do not share.
    """
    accelerator = Accelerator(cpu=True)
    policy = Policy(small.tied_llama())
    trainer = stage_trainer(policy, accelerator)
    metrics = [trainer.update(STAGE_ROWS, SupervisedObjective()) for _ in range(2)]
    checkpoints = Checkpoints(folder / "checkpoints", writes=accelerator.is_main_process)
    checkpoints.save(2, {"trainer": trainer.state_dict()})
    checkpoints.wait()
    metrics.append(trainer.update(STAGE_ROWS, SupervisedObjective()))
    reference = place(Policy(small.tied_llama(seed=1)).requires_grad_(False), accelerator).eval()
    scored = gather_all(
        accelerator,
        [row.tokens for row in STAGE_ROWS],
        lambda own: [found.logprobs.tolist() for found in token_logprobs(reference, own, 20)],
        round_robin(len(STAGE_ROWS)),
    )
    answers = NativeEngine(policy.lm, small.EOS).sample(REQUESTS, SamplingSettings(6, 1.0))
    found = {
        "metrics": metrics,
        "weights": trainer.weights(),
        "reference": scored,
        "answers": [answer.tokens for group in answers for answer in group],
        "held": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in policy.parameters()),
    }
    torch.save(found, folder / f"{accelerator.process_index}.pt")


def stage_trainer(policy: Policy, accelerator: Accelerator) -> Trainer[Any]:
    settings = OptimizerSettings(1e-3, "linear", epsilon=1e-3, weight_decay=0.1)
    return Trainer(policy, settings, total_steps=4, micro_batch_tokens=20, accelerator=accelerator)


def main(folder: str, results: str) -> None:
    torch.set_num_threads(1)
    os.environ[TENSOR_PARALLEL] = "2"
    stage(Path(results))
    del os.environ[TENSOR_PARALLEL]
    AcceleratorState._reset_state(reset_partial_state=True)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    split = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]  # accelerate would give each process a part of the rows
    sizes = {
        name: weight.to_local().numel() / weight.numel()
        for name, weight in split.named_parameters()
        if isinstance(weight, DTensor)
    }
    assert set(sizes.values()) >= {0.5}, sizes
    assert len(sizes) >= 14, sizes
    ours, theirs = trained(split), trained(plain)
    assert ours[2] == theirs[2], (ours[2], theirs[2])
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.keys() == other.keys()
        assert all(abs(mine[name] - other[name]) < 1e-5 * max(1.0, abs(other[name])) for name in other), (mine, other)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        assert float((ours[1][name] - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max())), name
    dist.barrier()
    dist.destroy_process_group()
    print("equal", max(float((ours[1][n] - theirs[1][n]).abs().max()) for n in theirs[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])

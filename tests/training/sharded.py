"""Run by two processes under FSDP2: load, train, checkpoint and sample a model that neither of them ever holds whole."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from posttrain.models import deferred
from posttrain.models.folders import load_policy
from posttrain.models.inference import token_logprobs
from posttrain.models.lora import Adapter
from posttrain.models.policy import Policy
from posttrain.models.shards import gathered
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import LoraSettings, OptimizerSettings
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.sharding import full, place, shards
from posttrain.training.supervised import Example, SupervisedObjective
from posttrain.training.trainer import Trainer
from tests.models import nf4, small

ROWS = [Example(tokens) for tokens in small.rows(6)]
SETTINGS = SamplingSettings(6, 1.0)
REQUESTS = [Request((5, 6, 7), ((1,), (2,), (3,))), Request((9, 8), ((4,),))]


def live_bytes() -> int:
    """Return the bytes of all tensors that this process holds, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and not isinstance(thing, DTensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Peak:
    """The most bytes since its start, looked at whenever a weight is read or a layer computes."""

    def __init__(self) -> None:
        gc.freeze()  # of what is there already nothing is looked at again
        self.before, self.most, self.pauses = live_bytes(), 0, False

    def look(self, *_: Any) -> None:
        if self.pauses:
            return
        held = live_bytes() - self.before
        if held > self.most:
            gc.collect()  # garbage in cycles is not held; when the collector runs by itself differs from run to run
            self.most = max(self.most, live_bytes() - self.before)

    def watch_reads(self) -> None:
        read: Callable[[nn.Parameter], nn.Parameter] = deferred._read

        def watched(parameter: nn.Parameter) -> nn.Parameter:
            value = read(parameter)
            self.look()
            return value

        deferred._read = watched

    def watch_layers(self, policy: Policy) -> None:
        for layer in policy.lm.model.layers:  # type: ignore[union-attr, operator]
            layer.register_forward_hook(self.look)


def loaded(folder: Path, accelerator: Accelerator) -> Policy:
    return place(Policy(load_policy(folder, shards(accelerator))), accelerator)


def trainer_of(policy: Policy, accelerator: Accelerator) -> Trainer[Any]:
    return Trainer(policy, OptimizerSettings(1e-2), total_steps=3, micro_batch_tokens=40, accelerator=accelerator)


def updated(trainer: Trainer[Any], updates: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for _ in range(updates):
        metrics = trainer.update(ROWS, SupervisedObjective())
    return metrics


def sums(policy: Policy) -> dict[str, float]:
    """Return the sum of each weight, whose change shows that it is trained."""
    return {name: float(full(value.double().sum())) for name, value in policy.state_dict().items()}


def results(folder: Path, checkpoints: Checkpoints, accelerator: Accelerator) -> dict[str, Any]:
    """Return results that one process with all weights can find as well."""
    found: dict[str, Any] = {}
    peak = Peak()
    peak.watch_reads()
    policy = loaded(folder, accelerator)
    found["packs"], found["loaded"] = policy.packs, peak.most
    peak.watch_layers(policy)
    reference = loaded(folder, accelerator).requires_grad_(False).eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    with gathered(policy):
        own = REQUESTS if world == 1 else REQUESTS * (rank == 0)  # the second process has nothing to do
        answers = NativeEngine(policy.lm, small.EOS).sample(own, SETTINGS)
    found["answers"] = [[(a.tokens, a.logprobs) for a in group] for group in answers]
    shared = [row.tokens for row in ROWS][: 4 if rank == 0 else 1]
    found["reference"] = [t.logprobs.tolist() for t in token_logprobs(reference, shared, 1)]
    found["sampled"] = peak.most
    token_logprobs(policy, shared, 40)  # as a reference before it is trained
    trainer = trainer_of(policy, accelerator)
    before = sums(policy)
    updated(trainer, 2)
    found["unmoved"] = [name for name, value in sums(policy).items() if value == before[name]]
    peak.pauses = True  # the collector's list of objects must not be read while another thread makes some
    checkpoints.save(2, {"trainer": trainer.state_dict(), "last": {"loss": 1.0}})
    found["metrics"] = updated(trainer, 1)  # while the checkpoint is written
    checkpoints.wait()
    found["trained"], found["weights"] = peak.most, trainer.weights()
    again = trainer_of(loaded(folder, accelerator), accelerator)
    _, state = checkpoints.latest() or (0, {})
    again.load_state_dict(state["trainer"])
    updated(again, 1)
    found["resumed"], found["last"] = again.weights(), state["last"]
    return found


def polled_often(folder: Path, accelerator: Accelerator) -> int:
    """Return the last step of 20 checkpoints whose files a thread writes while the main thread polls: neither waits for the other."""
    checkpoints = Checkpoints(folder, writes=accelerator.is_main_process)
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    weights = {f"{i}": distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]) for i in range(4)}
    for step in range(1, 21):
        checkpoints.save(step, {"weights": weights})
        for _ in range(12):
            checkpoints.poll()
    checkpoints.wait()
    step, _ = checkpoints.latest() or (0, {})
    return step


def adapted(folder: Path, accelerator: Accelerator) -> list[dict[str, Tensor]]:
    """Return adapters' weights after one update from their first, random ones: on the base as it is, and in 4 bits."""
    found = []
    with (
        patch("posttrain.extras.find_spec", lambda name: name),
        patch("posttrain.models.quantised._operators", lambda: nf4),
    ):
        for bits in (32, 4):
            torch.manual_seed(3)
            policy = Policy(load_policy(folder, shards(accelerator)))
            Adapter(policy.lm, LoraSettings(2, 4, ("q_proj", "down_proj"), bits))  # type: ignore[arg-type]
            trainer = trainer_of(place(policy, accelerator), accelerator)
            updated(trainer, 1)
            found.append(trainer.weights())
    return found


def in_bf16(folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Return the loss under bfloat16, the precision in which layers and gradients are held, and whether trials stayed exact.

    `cached` holds True if autocast would keep a copy of each gathered weight.
    """
    policy = loaded(folder, accelerator)
    seen, cached = set(), set()
    layer: Any = policy.lm.model.layers[0]  # type: ignore[union-attr, index]
    layer.mlp.down_proj.register_forward_hook(lambda module, *_: seen.add(module.weight.dtype))
    layer.register_forward_pre_hook(
        lambda *_: cached.add(torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
    )
    with gathered(policy):
        answers = NativeEngine(policy.lm, small.EOS).sample(REQUESTS, SETTINGS)
    metrics = updated(trainer_of(policy, accelerator), 1)
    held = {parameter.dtype for parameter in policy.parameters()}
    return {
        "loss": metrics["loss"], "seen": seen, "held": held, "packs": policy.packs, "answers": len(answers[0]), "cached": cached,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    accelerator = Accelerator(cpu=True)
    found = results(source, Checkpoints(out / "checkpoints", writes=accelerator.is_main_process), accelerator)
    found["polled"] = polled_often(out / "polled", accelerator)
    found["adapter"] = adapted(source, accelerator)
    accelerator.state._mixed_precision, accelerator.native_amp = "bf16", True
    found["bf16"] = in_bf16(source, accelerator)
    found = {name: full(value) for name, value in found.items()}
    torch.save(found, out / f"{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()

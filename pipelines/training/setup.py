"""Helpers shared by the training steps: tables, library settings from typed parameters, and the model card."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pipelines.config.schema import (
    CheckpointParams,
    ComputeParams,
    FaultParams,
    LoraParams,
    TrainingComputeParams,
    TurnsParams,
)
from pipelines.data.tables import read_rows
from pipelines.runtime.context import FAULTS, RunContext
from pipelines.runtime.machine import available_cores, peak_resident_mib
from pipelines.runtime.meeting import meet
from pipelines.runtime.outputs import RunOutputs
from pipelines.runtime.run import Run
from posttrain.combinations import Setup, require
from posttrain.errors import ConfigError, DataError
from posttrain.settings import layer_processes

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedModel

    from pipelines.config.params import Params
    from posttrain.data.tokens import TextEncoder
    from posttrain.models.lora import Adapter
    from posttrain.rollouts.engine import Engine
    from posttrain.rollouts.groups import Problem
    from posttrain.training.loop import StepHook
    from posttrain.training.source import BatchSource
    from posttrain.training.trainer import Objective, Trainer

VALID = Path("data/valid")
THREADS_FROM_PARAMETERS = 1_000_000
"""Smaller models use one thread.

Two threads are 1.8 times as fast as one at 3 million parameters, and 1.5 times at 0.4 million (benchmarks/scaling.md). Below this size,
parallel stages use the cores better.
"""
NVIDIA = Path("/proc/driver/nvidia/version")
"""A file of the loaded driver."""
GROUP_SECONDS = 1800.0
"""How long a process waits for the others in a collective operation. Rank 0 may start a vLLM server meanwhile, or score slowly."""

Model = TypeVar("Model", bound="nn.Module")


@dataclass(frozen=True)
class TrainableModel(Generic[Model]):
    """A model to train, and its adapter if it has one."""

    model: Model
    adapter: Adapter | None


class CheckedTraining(Protocol):
    """A section of parameters with the settings for checkpoints and numerical faults."""

    @property
    def checkpoint(self) -> CheckpointParams: ...

    @property
    def faults(self) -> FaultParams: ...


def read_table(name: str) -> list[dict[str, Any]]:
    """Return the rows of a validated table. Raises DataError if it is missing or empty."""
    path = VALID / f"{name}.parquet"
    if not path.exists():
        raise DataError(f"no table {path}; make it with `dvc repro validate`")
    rows = read_rows(path)
    if not rows:
        raise DataError(
            f"{path} has no rows, so there is nothing to train on; see the quarantine in data/quarantine and"
            " runs/validate/artifacts/validation.html"
        )
    return rows


def with_turns(engine: Engine, encoder: TextEncoder, params: TurnsParams | None) -> Engine:
    """Return the engine, or one that holds conversations with the environment that `params` names.

    Raises:
        ConfigError: the environment has a single turn.
    """
    if params is None:
        return engine
    from posttrain.environments.base import environment
    from posttrain.rollouts.turns import TurnEngine, Turns

    found = environment(params.environment)
    if found.step is None:
        raise ConfigError(
            f"turns.environment = {params.environment!r}: this environment has no `step`, so its task has a single turn; remove `turns`"
        )
    return TurnEngine(engine, encoder, Turns(found.step, params.limit, params.on_error, params.timeout_seconds))


def start_folder(params: Params, algorithm: str) -> str:
    """Return the folder of the model that an algorithm starts from, which is also its reference policy."""
    return f"models/{params.start(algorithm)}"


def problems(
    encoder: TextEncoder, table: list[dict[str, Any]], teacher: str | None = None, longest: int = 0
) -> list[Problem]:
    """Return prompts as token ids; every other column goes to the reward functions.

    Args:
        teacher: template of the prompt that a teacher reads, before an answer of at most `longest` tokens.
    """
    from posttrain.data.teacher_prompts import teacher_ids
    from posttrain.data.tokens import row_tools
    from posttrain.rollouts.groups import Problem

    return [
        Problem(
            row["prompt"],
            tuple(encoder.prompt(row["prompt"], row_tools(row), str(row["id"]))),
            {k: v for k, v in row.items() if k not in ("prompt", "id")},
            row["id"],
            teacher_ids(encoder, teacher, row, longest),
        )
        for row in table
    ]


def accelerator(context: RunContext, compute: ComputeParams, seed: int, start: Path) -> Accelerator:
    """Set memory, threads, seeds and precision of this process for a model of the size of `start`. The environment selects the device.

    Raises:
        ConfigError: a device was named that PyTorch does not see, or the processes of the run have different parameters or inputs.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from transformers.utils import logging

    from posttrain.distributed import gather_texts
    from posttrain.models.allocator import keep_heap
    from posttrain.models.kernels import set_kernels

    keep_heap()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(_threads(start) if compute.threads == "auto" else compute.threads)
    torch.manual_seed(seed)
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    set_kernels(compute.deterministic)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU, accelerate does not connect the processes unless it is asked to use the CPU.
    on_cpu = world > 1 and not torch.accelerator.is_available()
    meet(GROUP_SECONDS)
    patient = InitProcessGroupKwargs(timeout=timedelta(seconds=GROUP_SECONDS))
    made = Accelerator(cpu=on_cpu, mixed_precision="bf16" if compute.bf16 else "no", kwargs_handlers=[patient])
    if made.num_processes != world:
        raise ConfigError(
            f"{world} processes were launched, but only {made.num_processes} are connected; start them with `accelerate launch`"
        )
    _check_device(made.device.type, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    check_keys(gather_texts(made, context.key))
    if made.device.type == "cpu" and _has_unused_gpu():
        announce(
            context,
            f"runs on the CPU: this machine has an NVIDIA driver, but PyTorch {torch.__version__} sees no CUDA device. Check `nvidia-smi`,"
            " and install a CUDA build of torch (`infra/setup.sh torch` names it); CUDA_VISIBLE_DEVICES= (empty) hides this line",
        )
    if made.device.type != "cpu" and not compute.bf16:
        announce(
            context, f"{device_name(made.device)} computes in float32; bf16: true in its `compute` section is faster"
        )
    return made


def _check_device(kind: str, visible: str) -> None:
    """Refuse to train on the CPU if the environment names a CUDA device, e.g. one that a flow has leased."""
    if kind == "cpu" and visible.strip() not in ("", "-1"):
        import torch

        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES = {visible}, but PyTorch {torch.__version__} sees no CUDA device, so the step would run on the CPU."
            " Check the driver with `nvidia-smi` and install a CUDA build of torch; to use the CPU, set CUDA_VISIBLE_DEVICES= (empty)."
        )


def _has_unused_gpu() -> bool:
    """Return True if a driver for NVIDIA's GPUs is loaded, and the environment does not hide them."""
    return NVIDIA.exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() not in ("", "-1")


def check_keys(keys: Sequence[str]) -> None:
    """Compare the run keys of all processes. Raises ConfigError if one differs from rank 0's.

    Hosts with different params or tables would otherwise train one model together and record only rank 0's key.
    """
    other = [str(rank) for rank, key in enumerate(keys) if key != keys[0]]
    if other:
        raise ConfigError(
            f"rank {', '.join(other)} has other parameters, inputs or arguments than rank 0 (its run key differs). Bring params.yaml and"
            " the inputs of all hosts to the same state, e.g. with `git pull` and `dvc pull`; then start them again."
        )


def device_name(device: torch.device) -> str:
    """Return the device's kind and, on a GPU, its model: `cpu`, `cuda: NVIDIA H200`."""
    import torch

    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def _threads(start: Path) -> int:
    """Return all cores of this process, or its share among several processes; 1 for a small model, which is faster on one thread."""
    from posttrain.models.folders import count_parameters

    if count_parameters(start) < THREADS_FROM_PARAMETERS:
        return 1
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def apply_training_options(
    model: PreTrainedModel, params: LoraParams | None, compute: TrainingComputeParams
) -> Adapter | None:
    """Prepare a model for training: freeze it around a low-rank adapter, recompute activations and compile, as configured."""
    adapter = None
    if params is not None:
        from posttrain.models.lora import Adapter

        adapter = Adapter(model, params.settings())
    if compute.gradient_checkpointing:
        from posttrain.models.checkpointing import recompute_layers

        recompute_layers(model)
    if compute.compile:
        require(Setup(layer_processes(), layers=layer_processes(), compile=True))
        from posttrain.models.compiled import compile_layers

        compile_layers(model)
    return adapter


def adapter_facts(params: LoraParams | None, adapter: Adapter | None) -> dict[str, str]:
    """Return the adapter's rows of the model card."""
    if params is None or adapter is None:
        return {}
    facts = {"LoRA": f"rank {params.rank}, alpha {params.alpha:g}, {params.target_modules}"}
    if adapter.base_change is not None:
        facts["base"] = (
            f"trained on a base in 4 bits (NF4), which changes hidden states of a probe by up to {adapter.base_change:.1%} of the largest;"
            " the weights here are dequantised, with the adapter added"
        )
    return facts


def train(
    run: Run,
    trainer: Trainer[Any],
    source: BatchSource[Any],
    objective: Objective[Any],
    steps: int,
    shown: Sequence[str],
    params: CheckedTraining,
    hook: StepHook | None = None,
) -> dict[str, float]:
    """Train to the end and return the latest value of every metric; with --replay, repeat a saved update and exit."""
    from posttrain.training.checkpoint import Checkpoints
    from posttrain.training.faults import Faults, repeat
    from posttrain.training.loop import LoopSettings, fit

    context = run.context
    if context.args.replay is not None:
        print(repeat(trainer, source, objective, context.args.replay))
        sys.exit(0)
    checkpoint, at_most = params.checkpoint, params.faults.skip_at_most
    settings = LoopSettings(context.name, steps, tuple(shown), checkpoint.every_steps, checkpoint.every_minutes)
    kept = Checkpoints(context.state / FAULTS, at_most + 1, "fault", context.records)
    faults = Faults(kept, at_most, f"{context.command} --replay")
    checkpoints = Checkpoints(context.checkpoints, checkpoint.keep, writes=context.records)
    begun = partial(_note_kernels, run, trainer)
    # pyrefly: ignore[bad-argument-type]
    return fit(trainer, source, objective, settings, run.recorder, checkpoints, hook, faults, begun)


def _note_kernels(run: Run, trainer: Trainer[Any]) -> None:
    """Record which attention and head the run computes with; on a GPU, print them."""
    from posttrain.models.packed import attention_name
    from posttrain.models.policy import head_name

    with trainer.accelerator.autocast():
        attention, head = (find(trainer.unwrapped, trainer.accelerator.device) for find in (attention_name, head_name))
    run.recorder.kernels(attention, head)
    if trainer.accelerator.device.type != "cpu":
        announce(run.context, f"attention: {attention}")
        announce(run.context, f"head: {head}")


def merged_model(
    trainer: Trainer[Any], made: TrainableModel[Model], make: Callable[[], TrainableModel[Model]]
) -> TrainableModel[Model]:
    """Return the trained model with its adapter merged. Split weights are gathered once, by the process that saves the model.

    The other processes get their part of the model back.

    Args:
        make: builds the whole model with its training options on the CPU.
    """
    if trainer.sharded:
        weights = trainer.weights()
        if not trainer.accelerator.is_main_process:
            return made
        made = make()
        made.model.load_state_dict(weights, strict=False)
    if made.adapter is not None:
        made.adapter.merge()
    return made


def write_model(
    outputs: RunOutputs,
    model: PreTrainedModel,
    encoder: TextEncoder,
    folder: Path,
    card: str,
    adapter: Adapter | None = None,
    extra_config: dict[str, Any] | None = None,
) -> None:
    """Save and record a trained model; only one of several processes does."""
    from posttrain.models.folders import save_model

    if outputs.records:
        save_model(model, encoder.tokenizer, folder, card, extra_config, adapter, encoder.ends)
        outputs.model(folder)


def announce(context: RunContext, text: str) -> None:
    """Print one line with the amount of work before it starts."""
    if context.records:
        print(f"{context.name}: {text}", flush=True)


def peak_memory_mib() -> float:
    """Return the peak memory of this process in MiB: on the GPU if there is one, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_mib()


def model_card(context: RunContext, title: str, start: str, about: dict[str, Any], results: dict[str, float]) -> str:
    """Return the README.md of a model folder. It does not depend on clock or host."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in about.items())
    numbers = "\n".join(f"| {name} | {results[name]:.4g} |" for name in sorted(results))
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [posttrain]\n---\n\n"
        f"# {title}\n\nTrained from `{start}` by the stage `{context.name}` (run key `{context.key[:16]}`).\n\n"
        f"| parameter | value |\n|---|---|\n{facts}\n\n| last step | value |\n|---|---|\n{numbers}\n\n"
        "Load it with `transformers.AutoModelForCausalLM.from_pretrained(folder)` (a reward model: "
        "`AutoModelForSequenceClassification`, subtract `config.reward_mean` from its score).\n"
    )

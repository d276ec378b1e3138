"""Run one step in several processes, as `accelerate launch` does. The environment selects it, so the step's command stays the same.

    POSTTRAIN_ACCELERATE=infra/accelerate/ddp_cpu.yaml dvc repro

`accelerate config` writes the file. `accelerate launch --config_file FILE -m pipelines.sft` does the same by hand; here a failing
step also keeps its one-paragraph error and its own exit status.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.config.yaml_files import read_yaml
from posttrain.errors import ConfigError, Interrupted
from posttrain.settings import CONTEXT_PARALLEL, TENSOR_PARALLEL, layer_processes

VARIABLE = "POSTTRAIN_ACCELERATE"
INSTEAD = "Choose a file in infra/accelerate, or make one with `accelerate config`."


def process() -> int:
    """Return this process's rank among the launched processes; rank 0 logs and writes."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def launched() -> bool:
    """Return True if a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def asked(environ: Mapping[str, str] = os.environ) -> bool:
    """Return True if the environment names several processes, or how they share work."""
    return any(environ.get(name, "").strip() for name in (VARIABLE, TENSOR_PARALLEL, CONTEXT_PARALLEL))


def configuration(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file that the environment names, or None. Raises ConfigError if the file does not exist."""
    given = environ.get(VARIABLE, "").strip()
    if not given:
        return None
    path = Path(given).resolve()
    if not path.is_file():
        raise ConfigError(f"{VARIABLE} = {given!r}: no such file, so the processes cannot be started. {INSTEAD}")
    return path


def processes(path: Path | None) -> int:
    """Return the number of processes that the configuration starts on this machine."""
    if path is None:
        return 1
    try:
        tree = read_yaml(path)
    except ConfigError as error:
        raise ConfigError(f"{VARIABLE} names no configuration of accelerate: {error} {INSTEAD}") from None
    found: Any = tree.get("num_processes") if isinstance(tree, dict) else None
    if not isinstance(found, int) or found < 1:
        raise ConfigError(
            f"{VARIABLE} names {path}, where num_processes = {found!r}: must be a whole number of at least 1. {INSTEAD}"
        )
    return max(1, found // int(tree.get("num_machines") or 1))


def all_processes(path: Path | None) -> int:
    """Return the number of processes on all hosts, among which the answers of a step are divided."""
    tree: Any = {} if path is None else read_yaml(path)
    return int(tree.get("num_processes") or 1) if isinstance(tree, dict) else 1


def sharing_processes(path: Path | None) -> int:
    """Return the number of processes, on all hosts, among which the configuration splits weights; 1 if each holds all of them."""
    tree: Any = {} if path is None else read_yaml(path)
    splits = isinstance(tree, dict) and (tree.get("distributed_type") == "FSDP" or layer_processes() > 1)
    return all_processes(path) if splits else 1


def check_hosts(path: Path) -> None:
    """Raise ConfigError if a configuration for several hosts could not bring them together, or put rank 0 on any of them.

    Rank 0 records and writes the model, so it must run where the flow or DVC expects them: on the host with machine_rank 0.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict) or int(tree.get("num_machines") or 1) == 1:
        return
    if not tree.get("main_process_port"):
        raise ConfigError(
            f"{path}: main_process_port = {tree.get('main_process_port')!r} with num_machines = {tree['num_machines']}: each host would"
            " take a free port of its own and wait for the others there. Write one number, such as 29500, in the files of all hosts"
        )
    if not tree.get("main_process_ip"):
        raise ConfigError(
            f"{path}: num_machines = {tree['num_machines']}, but no main_process_ip, so the hosts cannot find each other; write the address"
            " of the host with machine_rank 0"
        )
    if (method := tree.get("rdzv_backend") or "static") != "static":
        raise ConfigError(
            f"{path}: rdzv_backend = {method!r} gives ranks in the order of arrival, so the model might be written on any host; write"
            " rdzv_backend: static and a machine_rank in the file of each host"
        )


def check_device(path: Path) -> None:
    """Raise ConfigError if a configuration is for more GPUs than PyTorch sees; without any, accelerate would train on the CPU.

    Processes that share a GPU cannot exchange tensors: NCCL refuses them.
    """
    import torch

    tree = read_yaml(path)
    wants = isinstance(tree, dict) and tree.get("distributed_type") in ("MULTI_GPU", "FSDP") and not tree.get("use_cpu")
    if wants and not torch.accelerator.is_available():
        raise ConfigError(
            f"{path}: for GPUs (use_cpu: {str(tree.get('use_cpu', False)).lower()}), but PyTorch {torch.__version__} sees none, so the step"
            " would run on the CPU. Check the driver with `nvidia-smi`, and install a CUDA build of torch; or choose a file for the CPU,"
            " such as infra/accelerate/fsdp2_cpu.yaml"
        )
    there, asked = torch.accelerator.device_count(), processes(path)
    if wants and asked > there:
        raise ConfigError(
            f"{path}: {asked} processes on this host, each with its own GPU, and PyTorch sees {there}"
            f" (CUDA_VISIBLE_DEVICES = {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). Lower num_processes, or make more GPUs visible"
        )


def launch(path: Path, module: str, arguments: list[str]) -> int:
    """Run `python -m module` in the configured processes; return the exit status of the first one that failed."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    check_hosts(path)
    check_device(path)
    # The processes have already printed their errors; torch would repeat them with a traceback.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", module, *arguments])
    if read_yaml(path).get("use_cpu"):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        launch_command(args)
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as signalled:
        print(f"stopped by {signalled.sigval.name}; run the same command to continue", file=sys.stderr)
        return Interrupted.exit_code
    return 0

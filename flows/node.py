"""Run one stage over several hosts that share only the network; start it on each of them.

    python -m flows.node align@grpo-0 --rank 0 --hosts 2 --address HOST0 [--port 29500] [--config infra/accelerate/fsdp2_gpu.yaml]
                         [--restarts 3]

Each host has a clone of the same commit with the same params.yaml and dvc.lock, and a DVC remote. It pulls the stage's inputs, waits for
free devices, and starts `num_processes` of its configuration, which may differ between hosts. Rank 0 records the stage in its dvc.lock,
and copies the result and, every `checkpoint_seconds` of infra/workers.yaml, a checkpoint to the remote; the other hosts write nothing. If a
host is lost, all end: start them again, rank 0 on any host, and the run continues from the checkpoint, which the others receive. With
--restarts N the hosts that are left start their processes again by themselves, up to N times, and wait for the one that takes the lost
host's rank. infra/slurm and infra/kubernetes have a job script and a JobSet that start it. The stage runs even if it is up to date.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from pipelines.config.yaml_files import read_yaml
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, reports_errors, whole
from pipelines.runtime.launch import VARIABLE, processes
from pipelines.runtime.meeting import Place, tell
from pipelines.tracking.lockfile import read_lock
from posttrain.errors import ConfigError, PosttrainError
from posttrain.network import is_listening, wait_until
from tasks.console import print_line
from tasks.dag import read_dag
from tasks.pool import checkpoints
from tasks.pool.copies import Copies
from tasks.pool.order import PARAMS, StageOrder
from tasks.pool.settings import read_settings
from tasks.pool.snapshot import inputs_of, read_paths
from tasks.pool.transfer import find_stage, opened, pull_inputs, push_results
from tasks.process import start
from tasks.samplers import stage_slots
from tasks.slots import SEVERAL_PROCESSES, has_several_processes, lease
from tasks.stage import dvc_command, grace_seconds

END_SECONDS = 60.0
"""How long a host waits for the end of a failed run on rank 0."""


def accelerate_settings(base: Path, rank: int, hosts: int, address: str, port: int) -> dict[str, Any]:
    """Return the accelerate configuration of one host; `base` is that of a single host, whose processes each host starts."""
    if not 0 <= rank < hosts:
        raise ConfigError(f"--rank {rank} must be from 0 to {hosts - 1}, one for each of --hosts {hosts}")
    return {
        **read_yaml(base),
        "num_machines": hosts,
        "num_processes": hosts * processes(base),
        "machine_rank": rank,
        "main_process_ip": address,
        "main_process_port": port,
        "rdzv_backend": "static",
    }


def run(root: Path, stage: str, rank: int, settings: dict[str, Any], restarts: int = 0) -> int:
    """Run this host's processes of the stage, again after a failure up to `restarts` times, and return the last exit status."""
    stopped = Event()
    while True:
        try:
            status = _run_once(root, stage, rank, settings, stopped)
        except PosttrainError as error:
            if rank:  # nothing listens yet if rank 0 fails here
                tell(_place(rank, settings), f"host {rank}: {error}")
            raise
        if status == 0 or stopped.is_set() or restarts == 0:
            return status
        print_line(
            f"{stage} ended with status {status} on this host, as after the loss of a host: starting it again from its checkpoint"
            f" ({restarts} restarts are left)"
        )
        restarts -= 1
        if rank:
            _wait_for_end(settings, stopped)


def _place(rank: int, settings: dict[str, Any]) -> Place:
    return Place(rank, settings["num_processes"], settings["main_process_ip"], settings["main_process_port"], False)


def _wait_for_end(settings: dict[str, Any], stopped: Event) -> None:
    """Wait until the failed run has ended on rank 0, so that this host does not join it again."""
    address = str(settings["main_process_ip"]), int(settings["main_process_port"])
    wait_until(lambda: not is_listening(*address), lambda: not stopped.is_set(), END_SECONDS)


def _run_once(root: Path, stage: str, rank: int, settings: dict[str, Any], stopped: Event) -> int:
    """Run this host's processes of the stage and return the exit status."""
    with opened(root) as repo:
        command: Any = find_stage(repo, stage).cmd
        pull_inputs(repo, stage)
    if rank == 0:
        return _run_first(root, stage, settings, stopped)
    return _start(root, stage, ["/bin/sh", "-c", command], settings, stopped)


def _run_first(root: Path, stage: str, settings: dict[str, Any], stopped: Event) -> int:
    """Run the processes of the host that records the stage; its checkpoints and its result go to DVC's remote."""
    key = order_of(root, stage).key
    with opened(root) as repo:
        held = checkpoints.download(repo, root, key, stage)
    if held:
        print_line(f"{stage} continues from checkpoint {held} of the remote")
    seconds = read_settings(root, read_yaml(root / "dvc.yaml")["stages"]).checkpoint_seconds
    copies = Copies(root, stage, key, seconds, print_line, newest=held or "")
    # restored from a cache, it would not meet the other hosts
    command = [*dvc_command(stage, "stage", refresh=False), "--force"]
    with copies.made():
        status = _start(root, stage, command, settings, stopped)
    if status == 0:
        push_results(root, stage)
        checkpoints.remove(root, key)
    else:
        copies.copy()
    return status


def order_of(root: Path, stage: str) -> StageOrder:
    """Return the stage with its inputs as an order, whose key is that of its checkpoints. An image has no git, so it names no commit."""
    node, paths = read_dag(root)[stage], read_paths(root)
    files = {PARAMS: (root / PARAMS).read_text(encoding="utf-8")}
    return StageOrder(stage, "", files, inputs_of(node, paths, read_lock(root)))


def _start(root: Path, stage: str, command: list[str], settings: dict[str, Any], stopped: Event) -> int:
    """Run a command that starts this host's processes, on leased devices. A signal ends them and sets `stopped`."""
    with TemporaryDirectory(prefix="posttrain-") as folder:
        path = Path(folder) / "accelerate.yaml"
        # JSON is YAML too, and quotes `no`, which accelerate would read as a boolean
        path.write_text(json.dumps(settings), encoding="utf-8")
        slots = stage_slots(root, stage, {**os.environ, VARIABLE: str(path)})
        with lease(slots, stopped) as held:
            process = start(
                command,
                root,
                extra=held.environment() | {VARIABLE: str(path)},
                output=sys.stdout.fileno(),
                pass_fds=held.descriptors,
                grace_seconds=grace_seconds(),
            )

            def stop(*_: object) -> None:
                stopped.set()
                process.terminate()

            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            return process.wait()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", help=f"one of {', '.join(SEVERAL_PROCESSES)}, or an instance such as align@grpo-0")
    parser.add_argument("--rank", type=whole(0), required=True, help="number of this host, from 0")
    parser.add_argument("--hosts", type=whole(2), required=True, help="number of hosts")
    parser.add_argument("--address", required=True, help="name or address of the host with rank 0")
    parser.add_argument("--port", type=whole(1, 65535), default=29500, help="a free port of that host")
    parser.add_argument(
        "--restarts", type=whole(0), default=0, help="how often the processes start again after a failure (default: 0)"
    )
    parser.add_argument(
        "--config", type=Path, default=Path("infra/accelerate/fsdp2_gpu.yaml"), help="accelerate file of a single host"
    )


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("python -m flows.node", __doc__)
    _arguments(parser)
    args = parser.parse_args(argv)
    root = environment.root()
    environment.require_writable(root)
    if not has_several_processes(args.stage):
        raise ConfigError(
            f"{args.stage} runs as one process: only {', '.join(SEVERAL_PROCESSES)} run over several hosts"
        )
    if not args.config.is_file():
        raise ConfigError(f"--config {args.config}: no such file; choose one in infra/accelerate")
    settings = accelerate_settings(args.config, args.rank, args.hosts, args.address, args.port)
    return run(root, args.stage, args.rank, settings, args.restarts)


if __name__ == "__main__":
    sys.exit(main())

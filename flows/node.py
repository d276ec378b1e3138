"""Run one training stage over several hosts that share only the network; start it on each of them.

    python -m flows.node align@grpo-0 --rank 0 --hosts 2 --address HOST0 [--port 29500] [--config infra/accelerate/fsdp2_gpu.yaml]

Each host has a clone of the same commit with the same params.yaml and dvc.lock, and a DVC remote. It pulls the stage's inputs, waits for
free devices, and starts `num_processes` of the configuration. Rank 0 records the stage in its dvc.lock and pushes the result; the other
hosts write nothing. If a host is lost, all end: start them again, and the run continues from rank 0's checkpoint, which the others receive.
infra/slurm and infra/kubernetes have a job script and a JobSet that start it. The stage runs even if it is up to date.
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
from posttrain.errors import ConfigError
from tasks.pool.transfer import find_stage, opened, pull_inputs, push_results
from tasks.process import start
from tasks.slots import TRAINING_STAGES, lease, machine_slots, trains
from tasks.stage import dvc_command, grace_seconds


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


def run(root: Path, stage: str, rank: int, settings: dict[str, Any]) -> int:
    """Run this host's processes of the stage and return the exit status."""
    with opened(root) as repo:
        command: Any = find_stage(repo, stage).cmd
        pull_inputs(repo, stage)
    with TemporaryDirectory(prefix="posttrain-") as folder:
        path = Path(folder) / "accelerate.yaml"
        # JSON is YAML too, and quotes `no`, which accelerate would read as a boolean
        path.write_text(json.dumps(settings), encoding="utf-8")
        slots = machine_slots({**os.environ, VARIABLE: str(path)})
        recorded = [
            *dvc_command(stage, "stage", refresh=False),
            "--force",
        ]  # restored from a cache, it would not meet the others
        with lease(slots, Event()) as held:
            process = start(
                recorded if rank == 0 else ["/bin/sh", "-c", command],
                root,
                extra=held.environment() | {VARIABLE: str(path)},
                output=sys.stdout.fileno(),
                pass_fds=held.descriptors,
                grace_seconds=grace_seconds(),
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: process.terminate())
            status = process.wait()
    if status == 0 and rank == 0:
        push_results(root, stage)
    return status


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", help=f"one of {', '.join(TRAINING_STAGES)}, or an instance such as align@grpo-0")
    parser.add_argument("--rank", type=whole(0), required=True, help="number of this host, from 0")
    parser.add_argument("--hosts", type=whole(2), required=True, help="number of hosts")
    parser.add_argument("--address", required=True, help="name or address of the host with rank 0")
    parser.add_argument("--port", type=whole(1, 65535), default=29500, help="a free port of that host")
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
    if not trains(args.stage):
        raise ConfigError(
            f"{args.stage} runs as one process: only {', '.join(TRAINING_STAGES)} train over several hosts"
        )
    if not args.config.is_file():
        raise ConfigError(f"--config {args.config}: no such file; choose one in infra/accelerate")
    settings = accelerate_settings(args.config, args.rank, args.hosts, args.address, args.port)
    return run(root, args.stage, args.rank, settings)


if __name__ == "__main__":
    sys.exit(main())

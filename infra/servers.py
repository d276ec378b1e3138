"""Run all servers as plain processes on this machine, without containers.

    python -m infra.servers up       PostgreSQL, S3 store, MLflow with accounts, Prefect server, one worker; deploys prefect.yaml
    python -m infra.servers status   running servers and their addresses
    python -m infra.servers down     stop them; databases and logs are kept
    python -m infra.servers start NAME... | stop NAME...      some of them: postgres s3 mlflow prefect worker
    python -m infra.servers backup FOLDER | restore FOLDER    the databases

All servers listen only on 127.0.0.1. Passwords are generated once and stored in .posttrain/servers/secrets.json. After
`source .posttrain/servers/env`, any command of this project uses the servers. POSTTRAIN_PORTS sets the first of four ports (default
15430): PostgreSQL, S3, MLflow, Prefect.
"""

from __future__ import annotations

import sys
from pathlib import Path

from infra.backup import backup, restore
from infra.topology import ADMIN, ORDER, Topology
from pipelines.config.params import load_params
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, print_text, reports_errors
from posttrain.errors import OrchestrationError


def status(topology: Topology) -> str:
    """Return the state of each server and their addresses."""
    rows = []
    for service in topology.services():
        pid = topology.processes.pid(service.name)
        state = (
            "not running" if pid is None else f"pid {pid}, {'responds' if service.healthy() else 'DOES NOT RESPOND'}"
        )
        rows.append(f"  {service.name:<9} {state}")
    experiment = load_params(topology.project / "params.yaml").project.experiment
    return "\n".join(
        [
            *rows,
            f"Prefect:  {topology.url('prefect')}",
            f"MLflow:   {topology.url('mlflow')}/#/models/{experiment}   (user {ADMIN}; the password is in {topology.home}/secrets.json)",
            f"commands: source {topology.home}/env",
            f"logs:     {topology.home}/*.log",
        ]
    )


def _act(topology: Topology, action: str, names: list[str]) -> None:
    """Carry out one action."""
    if action == "up":
        topology.up()
    elif action == "down":
        topology.down()
    elif action == "start":
        for name in _known(names):
            topology.start(name)
    elif action == "stop":
        topology.down(_known(names))
    elif action != "status":
        if len(names) != 1:
            raise OrchestrationError(f"{action} needs one folder, e.g. `python -m infra.servers {action} backup`")
        _copy(topology, action, Path(names[0]))
    if action in ("up", "status", "start"):
        print_text(status(topology))


def _copy(topology: Topology, action: str, folder: Path) -> None:
    """Back the databases up, or restore them."""
    if action == "backup":
        print("\n".join(f"  {path}" for path in backup(topology.postgres, folder)))
    else:
        restore(topology.postgres, topology.processes, folder)
        print(f"  restored from {folder}; `python -m infra.servers up` starts the servers")


def _known(names: list[str]) -> list[str]:
    """Return the names. Raises OrchestrationError if one is unknown."""
    wrong = [name for name in names if name not in ORDER]
    if wrong or not names:
        raise OrchestrationError(
            f"{' '.join(wrong) or 'no name'}: not a server; give one or more of {', '.join(ORDER)}"
        )
    return names


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("python -m infra.servers", __doc__)
    parser.add_argument("action", choices=("up", "down", "status", "start", "stop", "backup", "restore"))
    parser.add_argument("names", nargs="*", metavar="NAME | FOLDER")
    args = parser.parse_args(argv)
    environment.quiet()
    environment.require_writable(environment.root())
    _act(Topology(environment.root()), args.action, args.names)
    return 0


if __name__ == "__main__":
    sys.exit(main())

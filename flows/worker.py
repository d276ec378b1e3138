"""A worker of this workspace: polls the work pool for flow runs, and starts each in its own process.

    python -m flows.worker [--pool posttrain]

PREFECT_API_URL names the server. A flow run that died with the worker before this one is marked Crashed first, which gives
its place in the queue back; the next run goes on from its checkpoints.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from prefect.settings import PREFECT_API_URL

from flows.deploy import HEARTBEAT_SECONDS
from flows.server import require_server
from flows.workspace import sweep
from pipelines.runtime import environment
from pipelines.runtime.redaction import report_error
from posttrain.errors import OrchestrationError, PosttrainError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.worker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", default="posttrain", help="name of the work pool (default: posttrain)")
    args = parser.parse_args(argv)
    root = environment.root()
    try:
        url = PREFECT_API_URL.value()
        if not url:
            raise OrchestrationError(
                "a worker needs a Prefect server: set PREFECT_API_URL, or `make up` starts servers and a worker,"
                " or `make serve` does without a worker."
            )
        require_server(url)
        sweep(root)
    except PosttrainError as error:
        return report_error(error)
    return become_worker(root, args.pool)


def become_worker(root: Path, pool: str) -> NoReturn:
    os.chdir(root)
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
    prefect = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    os.execv(sys.executable, [*prefect, "--name", os.uname().nodename])


if __name__ == "__main__":
    sys.exit(main())

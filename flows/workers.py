"""Workers that run stages for flows on other machines: add one, list them, drain one.

    python -m flows.workers add [POOL]        run a worker in this clone until Ctrl-C
    python -m flows.workers list [POOL]       each worker, its stage and phase, and the stages that wait
    python -m flows.workers drain NAME        the worker finishes its stages, then ends

PREFECT_API_URL names the server; POOL is POSTTRAIN_POOL or `stages`. A worker needs a clone of the project whose git remote `origin` and
DVC remote are those of the flow, and the packages of `make setup`. It runs only stages of commits that a branch of that `origin`
holds, never a command from the server. Ctrl-C stops its stages at a checkpoint, and other workers go on with them.
"""

from __future__ import annotations

import argparse
import os
import sys

from prefect.settings import PREFECT_API_URL

from flows.pool import prepare, require_pool_server
from flows.server import require_server
from flows.stage_worker import drain, serve, worker_name
from flows.workers_page import overview
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, print_text, reports_errors
from tasks.pool.settings import VARIABLE


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("add", "list", "drain"))
    parser.add_argument("name", nargs="?", help="the pool (add, list) or the worker (drain)")
    parser.add_argument(
        "--pool", default=os.environ.get(VARIABLE) or "stages", help="the pool (default: POSTTRAIN_POOL)"
    )
    parser.add_argument("--name", dest="worker", help="name of the new worker (default: host and folder)")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("python -m flows.workers", __doc__)
    _arguments(parser)
    args = parser.parse_args(argv)
    pool = args.pool if args.action == "drain" or args.name is None else args.name
    require_pool_server(pool)
    require_server(str(PREFECT_API_URL.value()))
    if args.action == "list":
        print_text(overview(pool))
    elif args.action == "drain":
        if args.name is None:
            parser.error("drain needs the name of a worker; `python -m flows.workers list` shows them")
        print_text(drain(pool, args.name))
    else:
        root = environment.root()
        environment.require_writable(root)
        prepare(pool)
        serve(root, pool, args.worker or worker_name(root))
    return 0


if __name__ == "__main__":
    sys.exit(main())

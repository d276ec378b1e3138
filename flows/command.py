"""The command line that flows share, and the edge where errors become one paragraph and an exit status."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.server import prefect_api
from flows.signals import NUMBERS, raise_interrupt
from flows.workspace import refuse_second_flow
from posttrain.errors import Interrupted, PosttrainError
from tasks.console import say

ENVIRONMENT = """environment:
  POSTTRAIN_SLOTS          stages side by side (default: one per CUDA device, else per CPU core)
  POSTTRAIN_GRACE_SECONDS  time for a stage to write its checkpoint when stopped (default 20)
  PREFECT_API_URL          a Prefect server to report to (default: a private one that ends with the command)
  MLFLOW_TRACKING_URI      where MLflow keeps the runs (default: mlflow.db in the project)"""


def main(flow: Callable[..., Any], name: str, doc: str | None, arguments: list[str] | None = None) -> int:
    """Run `flow(root, targets, tracking, return_state=True)` from the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m flows.{name}",
        description=doc,
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "targets", nargs="*", metavar="STAGE", help="only these stages and what they need (default: all of dvc.yaml)"
    )
    parser.add_argument(
        "--root", type=Path, default=Path("."), help="the project's root (default: the current directory)"
    )
    parser.add_argument("--no-tracking", action="store_true", help="do not carry the journals into MLflow now")
    options = parser.parse_args(arguments)
    for number in NUMBERS:
        signal.signal(number, raise_interrupt)
    try:
        refuse_second_flow(options.root)
        with prefect_api(options.root) as configured:
            say("Prefect: " + (configured or "private server"))
            state = flow(str(options.root), options.targets, not options.no_tracking, return_state=True)
            return _status(state)
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as signalled:
        print(f"stopped by {signalled}", file=sys.stderr)
        return Interrupted.exit_code


def _status(state: Any) -> int:
    if state.is_completed():
        return 0
    if state.is_cancelled():
        print("stopped; finished stages are kept, the same command continues", file=sys.stderr)
        return Interrupted.exit_code
    error = state.result(raise_on_failure=False)
    if isinstance(error, PosttrainError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, BaseException):
        raise error
    print(f"error: the flow ended {state.name}: {state.message}", file=sys.stderr)
    return 1

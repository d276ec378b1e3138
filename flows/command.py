"""Command line that the flows share: it turns errors into one paragraph and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import tags
from prefect.exceptions import PrefectHTTPStatusError

from flows.lock import refuse_second_flow
from flows.names import TAG
from flows.server import prefect_api
from flows.signals import raise_interrupt
from flows.workspace import early_fork_server
from pipelines.runtime.command_line import report_error, report_machine_fault
from pipelines.runtime.environment import require_writable
from pipelines.runtime.machine import require_stage_guard
from pipelines.runtime.process import stopping_signals
from pipelines.runtime.redaction import redact
from posttrain.errors import Interrupted, OrchestrationError, PosttrainError
from tasks.console import print_line
from tasks.dag import import_dvc

ENVIRONMENT = """environment:
  POSTTRAIN_SLOTS          stages side by side (default: one per CUDA device, else per CPU core)
  POSTTRAIN_GRACE_SECONDS  time for a stage to write its checkpoint when stopped (default 8)
  POSTTRAIN_POOL           a work pool whose workers run the stages (default: none, they run on this machine)
  PREFECT_API_URL          a Prefect server to report to (default: a private one that ends with the command)
  MLFLOW_TRACKING_URI      where MLflow keeps runs and registry (default: mlflow.db in the project)
  POSTTRAIN_INBOX          folder or s3://BUCKET/PREFIX where new data arrive (default: inbox in the project)
  POSTTRAIN_SETTLE_SECONDS time for which a file of the inbox must not have changed (default 10)
  POSTTRAIN_INBOX_MB       largest file of the inbox, in megabytes after decompression (default 1024)
  POSTTRAIN_WEBHOOK        URL that receives failures, promotions and refusals (default: none)
  POSTTRAIN_WEBHOOK_SECRET secret that signs webhook messages: header X-Posttrain-Signature"""


def add_stages(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of flows over the DAG: which stages, and whether to track them."""
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="STAGE",
        help="only these stages and their dependencies (default: all of dvc.yaml)",
    )
    parser.add_argument("--no-tracking", action="store_true", help="do not copy the journals into MLflow now")


def main(
    name: str,
    doc: str | None,
    call: Callable[[argparse.Namespace], Any],
    add_arguments: Callable[[argparse.ArgumentParser], object],
    arguments: list[str] | None = None,
    *,
    exclusive: bool = True,
    runs_stages: bool = False,
) -> int:
    """Run a flow from the command line and return its exit status.

    `call` returns the flow's final state. If `exclusive` is true, the command refuses to start while a flow runs in this workspace.
    `runs_stages` is true for a flow over the DAG.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m flows.{name}",
        description=doc,
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--root", type=Path, default=Path("."), help="the project's root (default: the current directory)"
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    for number in stopping_signals():
        signal.signal(number, raise_interrupt)
    try:
        require_stage_guard()
        if not any((options.root / name).exists() for name in (".dvc", "params.yaml")):
            raise OrchestrationError(
                f"{options.root.absolute()} is not a project: it has no params.yaml. Set --root to the folder that holds it."
            )
        require_writable(options.root)
        if exclusive:
            refuse_second_flow(options.root)
        # a flow works in the current directory: a parameter of its run could name any folder
        early, meanwhile = (early_fork_server, import_dvc) if runs_stages else (contextlib.nullcontext, lambda: None)
        with contextlib.chdir(options.root), early(Path.cwd()), prefect_api(Path.cwd(), meanwhile) as configured:
            print_line("Prefect: " + redact(configured or "private server"))
            options.server = configured
            with tags(TAG):
                return _status(call(options))
    except PosttrainError as error:
        return report_error(error)
    except OSError as error:
        return report_machine_fault(error)
    except KeyboardInterrupt as signalled:
        print(f"stopped by {signalled}", file=sys.stderr)
        return Interrupted.exit_code


def _status(state: Any) -> int:
    """Return the exit status of a flow's final state, after printing its error."""
    if state.is_completed():
        return 0
    if state.is_cancelled():
        print(state.message, file=sys.stderr)
        return Interrupted.exit_code
    error = state.result(raise_on_failure=False)
    if isinstance(error, PosttrainError):
        return report_error(error)
    if isinstance(error, PrefectHTTPStatusError):
        reason = redact(str(error).splitlines()[0])
        return report_error(
            OrchestrationError(
                f"Prefect's server failed: {reason}. Finished stages are kept. Free space if its disk is full, or raise the limit of open"
                " files (`ulimit -n 4096`), then run again."
            )
        )
    if isinstance(error, BaseException):
        raise error
    print(f"error: the flow ended in the state {state.name}: {state.message}", file=sys.stderr)
    return 1

"""Retrain on new data and promote the new model if it is better.

Takes in the files of the inbox (POSTTRAIN_INBOX), updates changed .dvc inputs (`dvc update` for imports) and stale stages, and asks the
gate if the best aligned model may replace the champion in MLflow's registry. Without new data it ends at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.command import add_stages, main
from flows.gatekeeping import decide_promotion
from flows.hooks import HOOKS
from flows.names import dated
from flows.run_dag import bring_all_up_to_date
from flows.workspace import exclusive
from tasks.console import log_line
from tasks.intake import take_in


# pyrefly: ignore[no-matching-overload]
@flow(
    name="retrain",
    flow_run_name=dated("retrain"),
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type]
    persist_result=False,
    **HOOKS,
)
def retrain(targets: list[str] | None = None, tracking: bool = True, approval: bool = False) -> State[None] | None:
    """New data to champion, in the current directory.

    `targets` limits it to some stages, without the gate; `approval` asks a person first.
    """
    project = Path.cwd()
    with exclusive(project):
        for entry in take_in(str(project)):
            log_line(f"inbox: {entry.describe()}")
        stopped = bring_all_up_to_date(project, targets or [], tracking=tracking, refresh=True)
        if stopped is None and not targets:
            decide_promotion(project, tracking=tracking, approval=approval)
        return stopped


def _arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flow's arguments."""
    add_stages(parser)
    parser.add_argument(
        "--approval", action="store_true", help="wait for a person's approval after a model has passed the gate"
    )


def _call(options: argparse.Namespace) -> Any:
    return retrain(options.targets, not options.no_tracking, options.approval, return_state=True)


if __name__ == "__main__":
    sys.exit(main("retrain", __doc__, _call, _arguments, runs_stages=True))

"""Compare algorithms: the base model, every algorithm and seed of params.yaml, their evaluation and the report.

Brings every stage of dvc.yaml up to date; stages that are up to date do not run again.

    python -m flows.compare --seeds 5    # five seeds of each algorithm; those that have run stay
    python -m flows.compare --panel reward_model    # also PPO and GRPO on the reward model, with their over-optimisation
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
from flows.hooks import HOOKS
from flows.names import dated
from flows.run_dag import bring_all_up_to_date
from flows.workspace import exclusive
from pipelines.commands.panels import PANELS, add_panel
from pipelines.commands.seeds import raise_seeds
from pipelines.runtime.command_line import whole
from tasks.challenger import register_best
from tasks.console import print_line


# pyrefly: ignore[no-matching-overload]
@flow(
    name="compare",
    flow_run_name=dated("compare"),
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type]
    persist_result=False,
    **HOOKS,
)
def compare(targets: list[str] | None = None, tracking: bool = True) -> State[None] | None:
    """Bring the stages up to date, from the base model to the report. `targets` limits this to some stages and their dependencies."""
    with exclusive(Path.cwd()):
        stopped = bring_all_up_to_date(Path.cwd(), targets or [], tracking=tracking)
        if stopped is None and tracking and not targets:
            register_best(Path.cwd())
        return stopped


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_stages(parser)
    parser.add_argument(
        "--seeds",
        type=whole(1, 10_000),
        metavar="N",
        help="first add seeds to params.yaml until there are N; finished runs stay",
    )
    parser.add_argument(
        "--panel",
        choices=PANELS,
        help="first add PPO and GRPO that train on the reward model to params.yaml; finished runs stay",
    )


def _call(options: argparse.Namespace) -> Any:
    lines = raise_seeds(Path.cwd(), options.seeds) if options.seeds is not None else []
    lines += add_panel(Path.cwd()) if options.panel is not None else []
    for line in lines:
        print_line(line)
    return compare(options.targets, not options.no_tracking, return_state=True)


if __name__ == "__main__":
    sys.exit(main("compare", __doc__, _call, _add_arguments, runs_stages=True))

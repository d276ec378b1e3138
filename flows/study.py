"""Run studies: every arm and seed in the study's own workspaces, then the verdict by its rule.

    python -m flows.study group_size clip_higher
    python -m flows.study --all
    python -m flows.study group_size --base my.yaml     # on other parameters, model and data; nothing is committed

The stages are those of dvc.yaml. Workspaces are folders in .posttrain/studies that share the project's DVC cache, so that a stage that
ran in one study is restored in the next, and a study that is interrupted continues.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.command import main
from flows.hooks import HOOKS
from flows.names import dated
from flows.run_dag import bring_all_up_to_date
from flows.workspace import exclusive
from pipelines.commands.study import decide
from pipelines.studies.page import page
from pipelines.studies.results import PAGE, all_saved
from pipelines.studies.study import load_study, names
from pipelines.studies.workspace import prepare, pretraining, workspaces
from pipelines.tracking.store import tracking_uri
from posttrain.errors import ConfigError
from posttrain.files import write_atomic
from tasks.console import print_line


# pyrefly: ignore[no-matching-overload]
@flow(
    name="study",
    flow_run_name=dated("study"),
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type]
    persist_result=False,
    **HOOKS,
)
def study(chosen: list[str], base: str | None = None, tracking: bool = True) -> State[None] | None:
    """Bring every run of the studies up to date, decide them, and write docs/claims.md unless `base` replaces their base."""
    root = Path.cwd()
    own = None if base is None else Path(base)
    # one store for the project and its studies: each study is an experiment there
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(root))
    with exclusive(root):
        for name in chosen:
            loaded = load_study(root, name)
            first = pretraining(root, name, loaded, own)
            for space in [*([first] if first else []), *workspaces(root, name, loaded, own)]:
                prepare(root, space)
                print_line(
                    f"study {name}: {', '.join(space.arms) or 'pretraining'} in {space.folder.relative_to(root)}"
                )
                stopped = bring_all_up_to_date(space.folder, space.targets(loaded.seeds), tracking=tracking)
                if stopped is not None:
                    return stopped
            print(decide(root, name, own, write=own is None))
        if own is None:
            write_atomic(root / PAGE, page(all_saved(root)).encode())
    return None


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="studies of examples/studies")
    parser.add_argument("--all", action="store_true", help="run all studies")
    parser.add_argument("--base", type=Path, help="changes of params.yaml that replace the study's own base")
    parser.add_argument("--no-tracking", action="store_true", help="do not copy the journals into MLflow")


def _call(options: argparse.Namespace) -> Any:
    chosen = names(Path.cwd()) if options.all else options.names
    if not chosen:
        raise ConfigError(f"no study given. Type a name, or --all: {', '.join(names(Path.cwd()))}")
    base = str(options.base) if options.base else None
    return study(chosen, base, not options.no_tracking, return_state=True)


if __name__ == "__main__":
    sys.exit(main("study", __doc__, _call, _add_arguments))

"""Tune all algorithms of params.yaml equally: train the trials, choose on some prompts, and report with new seeds on the others.

    python -m flows.tune                  # writes .posttrain/tune/tuning.md and .posttrain/tune/tuned.yaml
    make tune

The stages are those of dvc.yaml, in a workspace in .posttrain/tune that shares the project's DVC cache: an interrupted search continues,
and more trials keep the finished ones. Put the sections of tuned.yaml into params.yaml to use the chosen values.
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
from pipelines.config.params import load_params
from pipelines.studies.workspace import prepare
from pipelines.tracking.store import tracking_uri
from pipelines.tuning.choose import answers, choose, report, split
from pipelines.tuning.page import page, sections
from pipelines.tuning.suggest import suggest
from pipelines.tuning.trials import trials
from pipelines.tuning.workspace import FOLDER, search_workspace
from posttrain.files import write_atomic
from tasks.console import print_line


# pyrefly: ignore[no-matching-overload]
@flow(
    name="tune",
    flow_run_name=dated("tune"),
    task_runner=ThreadPoolTaskRunner(max_workers=256),  # type: ignore[arg-type]
    persist_result=False,
    **HOOKS,
)
def tune(tracking: bool = True) -> State[None] | None:
    """Train all trials with one seed, choose one of each algorithm, and train the chosen ones with the project's seeds."""
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    found, seed, accuracy = trials(params), params.tune.training_seed, params.evaluation.accuracy
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(root))
    with exclusive(root):
        while True:
            space = search_workspace(root, found, [seed])
            prepare(root, space)
            print_line(f"tune: {len(found)} trials in {space.folder.relative_to(root)}")
            stopped = bring_all_up_to_date(space.folder, space.targets([seed]), tracking=tracking)
            if stopped is not None:
                return stopped
            asked = answers(space.folder, f"{found[0].name}-{seed}")
            ids = asked.prompt_ids
            mask = split(ids, params.tune.selection, params.tune.seed, asked.groups)
            own = [[trial for trial in found if trial.algorithm == name] for name in params.project.algorithms]
            chosen = [choose(space.folder, of_one, seed, accuracy, mask) for of_one in own]
            if len(own[0]) == params.tune.trials:
                break
            # one further trial of every algorithm, from the scores so far
            found = [*found, *(suggest(params, t, c.scores) for t, c in zip(own, chosen, strict=True))]
        best = search_workspace(root, [choice.best for choice in chosen], params.project.seeds)
        prepare(root, best)
        stopped = bring_all_up_to_date(best.folder, best.targets(params.project.seeds), tracking=tracking)
        if stopped is not None:
            return stopped
        results = [report(best.folder, choice, params.project.seeds, accuracy, mask) for choice in chosen]
        text = page(params, results, int(mask.sum()), len(ids))
        write_atomic(root / FOLDER / "tuning.md", text.encode())
        write_atomic(root / FOLDER / "tuned.yaml", sections(params, results).encode())
        print(text)
        print_line(f"chosen sections: {FOLDER / 'tuned.yaml'}")
    return None


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-tracking", action="store_true", help="do not copy the journals into MLflow")


def _call(options: argparse.Namespace) -> Any:
    return tune(not options.no_tracking, return_state=True)


if __name__ == "__main__":
    sys.exit(main("tune", __doc__, _call, _add_arguments))

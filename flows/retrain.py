"""Retrain on new data: takes in changed .dvc inputs (`dvc update` for imported ones), then the whole chain to the evaluation.

Stops at once, saying so, when no input, parameter or code has changed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prefect import flow
from prefect.client.schemas import State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.body import bring_all_up_to_date
from flows.command import main


@flow(name="retrain", task_runner=ThreadPoolTaskRunner(max_workers=256), persist_result=False)  # type: ignore[arg-type]
def retrain(root: str = ".", targets: list[str] | None = None, tracking: bool = True) -> State[None] | None:
    """New data to evaluation. `targets` limits it to some stages and what they need."""
    return bring_all_up_to_date(Path(root), targets or [], tracking=tracking, refresh=True)


if __name__ == "__main__":
    sys.exit(main(retrain, "retrain", __doc__))

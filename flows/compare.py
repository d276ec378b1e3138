"""Compare algorithms: the base model, every algorithm and seed of params.yaml, their evaluation and the report.

Brings every stage of dvc.yaml up to date; what is already up to date is not run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prefect import flow
from prefect.client.schemas import State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.body import bring_all_up_to_date
from flows.command import main


@flow(name="compare", task_runner=ThreadPoolTaskRunner(max_workers=256), persist_result=False)  # type: ignore[arg-type]
def compare(root: str = ".", targets: list[str] | None = None, tracking: bool = True) -> State[None] | None:
    """Base model to report. `targets` limits it to some stages and what they need."""
    return bring_all_up_to_date(Path(root), targets or [], tracking=tracking)


if __name__ == "__main__":
    sys.exit(main(compare, "compare", __doc__))

"""Take in new files of the inbox: pipelines.commands.intake checks them one by one, DVC versions them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from pipelines.commands.intake import RECORD, IntakeResult
from pipelines.data.inbox import location
from pipelines.data.inbox_folder import claimed_files
from pipelines.data.sources import ACCEPTED
from pipelines.runtime.markup import markdown_text
from pipelines.runtime.redaction import printable
from tasks.remote import restore_missing
from tasks.stage import StageFailed, run_logged


@task(name="intake", task_run_name="intake", cache_policy=NO_CACHE, persist_result=False)
def take_in(root: str) -> list[IntakeResult]:
    """Return the result for every waiting file. Accepted files are added to DVC, so that their bytes are kept and pushed."""
    project, pointer = Path(root), f"{ACCEPTED}.dvc"
    if (project / pointer).is_file():
        restore_missing(project, pointer)  # else `dvc add` below would record the new files as the only ones
    try:
        run_logged(project, "intake", [sys.executable, "-m", "pipelines.commands.intake"])
    except StageFailed as error:
        held = claimed_files(location(project))
        if not held:
            raise
        raise StageFailed(
            f"the process that checks the inbox was ended by {error.killed or 'an error'} while it read {printable(', '.join(held))}; most"
            " likely the file needs more memory than there is. The next run tries once more and then sets it aside; split the file to"
            " have it taken."
        ) from error
    taken = [IntakeResult(**entry) for entry in json.loads((project / RECORD).read_text(encoding="utf-8"))]
    unversioned = (project / ACCEPTED).is_dir() and not (project / pointer).exists()
    if unversioned or any(entry.outcome == "accepted" for entry in taken):
        run_logged(project, "intake-version", [sys.executable, "-m", "dvc", "add", "--quiet", str(ACCEPTED)])
    if taken:
        rows = [
            {
                "file": markdown_text(entry.file),
                "outcome": entry.outcome,
                "rows": entry.rows,
                "reason": markdown_text(entry.reason),
            }
            for entry in taken
        ]
        create_table_artifact(key="intake", table=rows, description="Files of the inbox, and their results")
    return taken

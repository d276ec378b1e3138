"""Record the tokens that a call of `posttrain judge` paid for as a run, which the page of costs and MLflow show."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path

from pipelines.config.params import Params
from pipelines.runtime import environment
from pipelines.runtime.context import MEASUREMENTS
from pipelines.runtime.journal import FINISHED, Journal
from pipelines.runtime.publish import JOURNAL
from pipelines.tracking.describe import JUDGE
from pipelines.tracking.projection import project as copy_run
from pipelines.tracking.store import DATABASE, ask, open_client, tracking_uri
from posttrain.judges import Usage


def record_usage(project: Path, session: str, params: Params, usage: Usage, began: float) -> Path | None:
    """Write a run with a call's seconds and paid tokens, and return its folder; None if nothing was paid.

    A call that ended early is a finished run too: it is the record of its paid questions. Each call is its own run, `judge-SESSION-NUMBER`.
    """
    if not usage.asked:
        return None
    judge = params.judge
    name = f"judge-{re.sub(r'[^A-Za-z0-9_.-]', '_', session)}"
    states = environment.states(project)
    states.mkdir(parents=True, exist_ok=True)
    numbers = [
        int(found[1]) for each in states.iterdir() if (found := re.fullmatch(rf"{name}-(\d+)-\w{{16}}", each.name))
    ]
    name = f"{name}-{max(numbers, default=0) + 1}"
    key = hashlib.sha256(f"{name} {session} {judge.model}".encode()).hexdigest()
    folder, now = states / f"{name}-{key[:16]}", time.time()
    folder.mkdir()

    measurements = Journal(folder / MEASUREMENTS, durable=False)
    surroundings = {"experiment": params.project.experiment, "commit": environment.commit()}
    tokens = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    measurements.append({"kind": "start", "time": began} | surroundings)
    measurements.append({"kind": "judge", "time": now, "model": judge.model} | tokens)
    measurements.append({"kind": "end", "time": now})
    measurements.close()

    values = {"model": judge.model, "criteria": judge.criteria, "max_tokens": judge.max_tokens}
    journal = Journal(folder / JOURNAL)
    start = {
        "run": folder.name,
        "name": name,
        "stage": JUDGE,
        "directory": f"labels/{session}",
        "key": key,
        "inputs": {},
    }
    journal.append({"kind": "start"} | start | {"arguments": {"session": session, "model": judge.model}})
    journal.append({"kind": "params", "values": {f"judge.{each}": value for each, value in values.items()}})
    journal.append({"kind": "end", "status": FINISHED})
    journal.close()
    return folder


def copy_to_mlflow(project: Path, folder: Path) -> None:
    """Copy the run into the project's MLflow store, if there is one; else the first `posttrain sync` or flow makes it.

    Raises TrackingError if the store does not respond.
    """
    if tracking_uri(project) == f"sqlite:///{project / DATABASE}" and not (project / DATABASE).is_file():
        return
    client = open_client(project)
    ask(
        client,
        lambda: copy_run(folder, client, project),
        "did not accept the judge's cost",
        "`posttrain sync` copies it later.",
    )

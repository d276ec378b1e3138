"""Answers of `posttrain serve` that were logged: the files in .posttrain/served, and their copies as MLflow traces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.runtime.journal import Journal, Record, read
from pipelines.tracking.store import ask, experiment_id, open_client
from pipelines.tracking.traces import SERVED, TracedAnswer, add_traces, write_traces

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = Path(".posttrain/served")
"""Small files, since `posttrain forget` deletes a whole file that quotes a forgotten row."""
PER_FILE = 256
SHADOW = "shadow"
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_ADVICE = "They are safe in .posttrain/served; `posttrain sync` copies them when it responds again."


def read_served(project: Path) -> list[Record]:
    """Return the logged answers in the order in which they were given, shadow answers among them."""
    return [record for path in _files(project) for record in read(path) if record["kind"] == SERVED]


def append_served(project: Path, records: Sequence[Record]) -> None:
    """Append records to the newest file, or begin a new one. Raises TrackingError if the disk is full.

    Only the owner can read the folder: people's prompts are in it.
    """
    (project / FOLDER).parent.mkdir(exist_ok=True)
    (project / FOLDER).mkdir(mode=0o700, exist_ok=True)
    files = _files(project)
    held = len(read(files[-1])) if files else 0
    for record in records:
        if not files or held >= PER_FILE:
            number = int(files[-1].stem) + 1 if files else 1
            files, held = [project / FOLDER / f"{number:06d}.jsonl"], 0
        journal = Journal(files[-1], durable=False)
        journal.append(record)
        journal.close()
        held += 1


class ServedTraces:
    """Copy logged answers into the project's MLflow experiment, linked to the model's version."""

    def __init__(self, project: Path, experiment: str) -> None:
        self._project, self._name = project, experiment
        self._client: MlflowClient | None = None
        self._owners: dict[str, tuple[str, str]] = {}

    def add(self, records: Sequence[Record]) -> None:
        """Copy answers that the store does not hold. Raises TrackingError if it does not respond."""
        self._copy(records, add_traces)

    def catch_up(self) -> int:
        """Copy every logged answer that the store does not hold yet, and return the number of logged answers."""
        records = read_served(self._project)
        if records:
            self._copy(records, write_traces)
        return len(records)

    def _copy(self, records: Sequence[Record], write: Any) -> None:
        client = self._client or open_client(self._project)
        self._client = client

        def copy() -> None:
            experiment = experiment_id(client, self._name, self._project)
            write(client, experiment, list(self._traced(client, experiment, records)))

        ask(client, copy, "did not accept the served answers", _ADVICE)

    def _traced(self, client: MlflowClient, experiment: str, records: Iterable[Record]) -> Iterator[TracedAnswer]:
        for record in records:
            run_id, model_id = self._owner(client, experiment, str(record["version"]))
            began = int(record["time"] * 1000)
            tags = {name: str(record[name]) for name in ("model", "version", "md5", "request") if record[name]}
            shadow = bool(record.get(SHADOW))
            name = f"{SHADOW if shadow else 'serve'} {record['model']}"
            tags |= {SHADOW: "true"} if shadow else {}
            yield TracedAnswer(
                f"{SERVED}/{record['id']}", SERVED, name, record["prompt"], record["completion"], began,
                began + int(record["seconds"] * 1000), run_id, model_id, tags,
            )  # fmt: skip

    def _owner(self, client: MlflowClient, experiment: str, version: str) -> tuple[str, str]:
        """Return the MLflow run and logged model of a registered version; empty if the registry does not know them."""
        from mlflow.exceptions import MlflowException

        if version and version not in self._owners:
            try:
                run_id = str(client.get_model_version(self._name, version).run_id or "")
                run_id = run_id if _RUN_ID.fullmatch(run_id) else ""  # written by hand, it could end the query below
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                run_id = ""
            models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'") if run_id else []
            self._owners[version] = run_id, str(models[0].model_id) if models else ""
        return self._owners.get(version, ("", ""))


def _files(project: Path) -> list[Path]:
    return sorted((project / FOLDER).glob("*.jsonl"))

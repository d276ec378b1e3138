"""Describe a run for MLflow: name, tags, parameters, a short note."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipelines.runtime.redaction import redact
from pipelines.tracking.lockfile import default_remote, locked_outputs
from pipelines.tracking.source import RecordedRun
from pipelines.tracking.store import workspace

RUN_TAG, WORKSPACE_TAG, JOURNAL_TAG = "posttrain.run", "posttrain.workspace", "posttrain.journal"
TIMINGS_TAG, REPLACED_TAG = "posttrain.timings", "posttrain.replaced"
REASON_TAG = "posttrain.reason"
_PARAM_LENGTH, _TAG_LENGTH, _SHOWN_TABLES = 6000, 8000, 100


def run_name(source: RecordedRun) -> str:
    """Return the run's name, e.g. `align grpo seed 0`."""
    words = [str(source.start["stage"])]
    for key, value in arguments(source).items():
        words.append(str(value) if isinstance(value, str) else f"{key} {value}")
    return " ".join(words)


def arguments(source: RecordedRun) -> dict[str, Any]:
    """Return the step's arguments that have a value."""
    given: dict[str, Any] = source.start.get("arguments", {})
    return {key: value for key, value in given.items() if value is not None}


def entity_name(name: str) -> str:
    """Return a name that MLflow accepts: pass@4 becomes pass_at_4."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def parameters(source: RecordedRun) -> dict[str, str]:
    """Return the run's parameters as text."""
    return {entity_name(name): _text(value)[:_PARAM_LENGTH] for name, value in source.values_of("params").items()}


def identity_tags(source: RecordedRun, project: Path) -> dict[str, str]:
    """Return the tags that identify the run and its checkout."""
    return {RUN_TAG: source.identity, WORKSPACE_TAG: workspace(project)}


def tags(source: RecordedRun, project: Path) -> dict[str, str]:
    """Return all tags for filters and comparisons. Unknown values are omitted, e.g. for a restored journal."""
    surroundings = source.surroundings()
    found: dict[str, Any] = {
        "stage": source.start["stage"],
        **{key: _text(value) for key, value in arguments(source).items()},
        **source.values_of("tags"),
        "mlflow.note.content": _note(source),
        "mlflow.source.git.commit": surroundings.get("commit"),
        "posttrain.dvc_stage": surroundings.get("dvc_stage"),
        "posttrain.flow_run": surroundings.get("flow_run"),
        TIMINGS_TAG: ",".join(sorted({entity_name(name) for name, _ in source.timings})) or None,
        "mlflow.loggedArtifacts": _tables(source),
        REASON_TAG: next((record.get("reason") for record in source.of("end")), None),
        **_model(source, project),
        **{
            f"dvc.md5/{p}": md5 for p, md5 in locked_outputs(project, source.start["directory"], source.journal).items()
        },
    }
    return {entity_name(k): redact(str(v))[:_TAG_LENGTH] for k, v in found.items() if v not in (None, "")}


def _model(source: RecordedRun, project: Path) -> dict[str, Any]:
    """Return the tags of a recorded model."""
    models = source.of("model")
    if not models:
        return {}
    return {
        "posttrain.model.path": models[-1]["path"],
        "posttrain.model.sha256": models[-1]["sha256"],
        "posttrain.model.remote": default_remote(project),
    }


def _tables(source: RecordedRun) -> str | None:
    """Return the list of tables for MLflow's UI."""
    shown = [{"path": record["path"], "type": "table"} for record in source.of("table")]
    return json.dumps(shown[-_SHOWN_TABLES:]) if shown else None


def _note(source: RecordedRun) -> str:
    """Return the run's note."""
    options = "".join(f" --{key.replace('_', '-')} {value}" for key, value in arguments(source).items())
    stage = source.start["stage"]
    return (
        f"Stage **{stage}**{', ' + run_name(source).removeprefix(stage).strip() if options else ''}.\n\n"
        f"* files: `{source.start['directory']}`\n"
        f"* comparison of all runs: `report/`\n"
        f"* run only this stage: `python -m pipelines.{stage}{options}`\n"
    )


def _text(value: Any) -> str:
    """Return a value as text."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)

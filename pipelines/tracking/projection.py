"""Bring the MLflow store up to date with a journal.

Each run identity has one MLflow run (tag `posttrain.run`). The store is queried for existing values before any are added, so an
interrupted, repeated or concurrent projection leaves exactly one value per metric and step. MLflow cannot remove a value. If the store
contradicts the journal, because the same run was executed again with a different result, its MLflow run is deleted and written again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipelines.config.params import load_params
from pipelines.runtime.journal import FINISHED, RUNNING
from pipelines.runtime.process import Lock
from pipelines.runtime.ranking import RANKED
from pipelines.tracking import describe
from pipelines.tracking.artifacts import send_artifacts
from pipelines.tracking.lineage import log_datasets, logged_model
from pipelines.tracking.rollouts import has_rollouts, rollout_answers
from pipelines.tracking.source import OLD_RESULT, RESULT, RecordedRun, Value, load
from pipelines.tracking.store import experiment_id, workspace
from pipelines.tracking.traces import EVALUATED, ROLLOUT, evaluated_answers, replace_traces
from pipelines.tracking.views import chart_order, experiment_tags
from posttrain.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

T = TypeVar("T")
_METRICS_PER_CALL, _PARAMS_PER_CALL = 1000, 100
_LARGEST_DOUBLE = 1.7976931348623157e308


@dataclass
class Link:
    """The known contents of one MLflow run."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    values: dict[Value, float]
    sent: set[str] = field(default_factory=set)


class Projector:
    """Copy the journals of one project into one store. Caches the store's contents between calls."""

    def __init__(self, client: MlflowClient, project: Path) -> None:
        self.client = client
        self.project_root = project
        self._workspace = workspace(project)
        self._token = uuid.uuid4().hex
        self._links: dict[str, Link] = {}
        self._experiments: dict[str, str] = {}

    def project(self, source: RecordedRun) -> str:
        """Bring the store up to date with a run and return the MLflow run id. A second call changes nothing."""
        mark = self._mark(source)
        with Lock(mark):
            if not mark.read_text(errors="replace").startswith(self._token):
                # A different process has written this run since then, so the cached contents may be outdated.
                self._links.pop(source.identity, None)
            mark.write_text(self._token)
            try:
                run_id = self._project(source)
                if source.status != RUNNING:
                    mark.write_text(f"{self._token} {self._stamp(source)}")
                return run_id
            except Exception:
                # The store may have executed a call although its response was lost: query the store again next time.
                self._links.pop(source.identity, None)
                raise

    def settled(self, source: RecordedRun) -> bool:
        """Return True if this checkout has already copied exactly this journal into this store; the store is not queried."""
        mark = self._mark(source)
        return mark.is_file() and mark.read_text(errors="replace").endswith(self._stamp(source))

    def _mark(self, source: RecordedRun) -> Path:
        """Return the file that notes the last copy of a run."""
        return self.project_root / ".posttrain" / "tracking" / source.identity

    def _stamp(self, source: RecordedRun) -> str:
        """Return a hash of the store's address and the run's contents."""
        state = [self.client.tracking_uri, source.status, source.digest, describe.tags(source, self.project_root)]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def sweep(self, alive: set[str]) -> list[str]:
        """End as KILLED every run of this checkout that the store calls running but that has no journal here."""
        query = f"tags.`{describe.WORKSPACE_TAG}` = '{self._workspace}' and attributes.status = 'RUNNING'"
        runs = self._search([self._experiment(self._default_experiment())], query)
        stale = [run for run in runs if self._is_ours(run) and run.data.tags.get(describe.RUN_TAG) not in alive]
        for run in stale:
            self.client.set_terminated(run.info.run_id, "KILLED")
        return [str(run.info.run_id) for run in stale]

    def describe_experiment(self, sources: Sequence[RecordedRun]) -> None:
        """Bring the experiment's description and its saved view up to date."""
        experiment = self._experiment(self._default_experiment())
        present = dict(self.client.get_experiment(experiment).tags)
        params = load_params(self.project_root / "params.yaml")
        for name, value in experiment_tags(experiment, sources, describe.headline_metric(params)).items():
            if present.get(name) != value:
                self.client.set_experiment_tag(experiment, name, value)

    def experiment(self, source: RecordedRun) -> str:
        """Return the id of the run's experiment."""
        return self._experiment(str(source.surroundings().get("experiment") or self._default_experiment()))

    def _default_experiment(self) -> str:
        """Return the experiment's name in params.yaml."""
        return load_params(self.project_root / "params.yaml").project.experiment

    def _experiment(self, name: str) -> str:
        """Return the id of an experiment, and create it if necessary."""
        if name not in self._experiments:
            self._experiments[name] = experiment_id(self.client, name, self.project_root)
        return self._experiments[name]

    def _project(self, source: RecordedRun) -> str:
        """Add missing parameters, metrics, tags and artifacts, and the end of the run."""
        wanted_tags = describe.tags(source, self.project_root)
        link = self._links.get(source.identity)
        if link is None:
            runs = self._candidates(source)
            done = next((run for run in runs if _complete(run, source) and self._has_results(run, wanted_tags)), None)
            if done is not None:
                if self._is_ours(done):
                    self._add_tags(done.info.run_id, dict(done.data.tags), wanted_tags)
                return str(done.info.run_id)
            link = self._attach(source, runs)
        if _contradicts(link, source):
            link = self._replace(link, source)
        self._links[source.identity] = link
        if link.status != RUNNING and source.status == RUNNING:
            self.client.update_run(link.run_id, status=RUNNING)
            link.status = RUNNING
        self._add_params(link, describe.parameters(source))
        model_id = logged_model(self.client, self.experiment(source), link.run_id, source)
        self._add_metrics(link, source, model_id)
        self._add_ranked(link, source)
        self._add_traces(link, source, model_id)
        self._add_tags(link.run_id, link.tags, wanted_tags)
        send_artifacts(self.client, link.run_id, source, link.sent)
        self._end(link, source)
        return link.run_id

    def _has_results(self, run: MlflowRun, wanted: dict[str, str]) -> bool:
        """Return True if the run holds the results of the evaluation, or belongs to a different checkout, which adds its own."""
        names = [describe.EVALUATION_TAG, describe.TRACES_TAG]
        names += [describe.RANKED_TAG] if describe.RANKED_TAG in wanted else []
        return not self._is_ours(run) or all(run.data.tags.get(name) == wanted.get(name) for name in names)

    def _candidates(self, source: RecordedRun) -> list[MlflowRun]:
        """Return the store's runs of this identity, those of this checkout first, without replaced ones."""
        query = f"tags.`{describe.RUN_TAG}` = '{source.identity}'"
        runs = self._search([self.experiment(source)], query)
        kept = [run for run in runs if describe.REPLACED_TAG not in run.data.tags]
        return sorted(kept, key=lambda run: run.data.tags.get(describe.WORKSPACE_TAG) != self._workspace)

    def _attach(self, source: RecordedRun, runs: Sequence[MlflowRun]) -> Link:
        """Return this checkout's run of the identity, or a new one. A run of a different checkout is left unchanged."""
        for run in runs:
            if self._is_ours(run):
                return self._link(run)
        return self._create(source)

    def _is_ours(self, run: MlflowRun) -> bool:
        """Return True if the run belongs to this checkout and is not deleted."""
        mine = run.data.tags.get(describe.WORKSPACE_TAG) == self._workspace
        return mine and bool(run.info.lifecycle_stage == "active")

    def _link(self, run: MlflowRun) -> Link:
        """Read the contents of an MLflow run."""
        run_id = str(run.info.run_id)
        history = (metric for name in run.data.metrics for metric in self.client.get_metric_history(run_id, name))
        values = {(metric.key, metric.step): metric.value for metric in history}
        return Link(run_id, run.info.status, dict(run.data.tags), dict(run.data.params), values)

    def _create(self, source: RecordedRun) -> Link:
        """Create an MLflow run."""
        tags = describe.identity_tags(source, self.project_root)
        run = self.client.create_run(
            self.experiment(source), start_time=source.started(), tags=tags, run_name=describe.run_name(source)
        )
        log_datasets(self.client, str(run.info.run_id), source)
        return Link(str(run.info.run_id), RUNNING, dict(run.data.tags), {}, {})

    def _replace(self, link: Link, source: RecordedRun) -> Link:
        """Delete the MLflow run and create a new one."""
        self.client.set_tag(link.run_id, describe.REPLACED_TAG, "true")
        for model in self.client.search_logged_models([self.experiment(source)], f"source_run_id = '{link.run_id}'"):
            self.client.delete_logged_model(model.model_id)
        for kind in (EVALUATED, ROLLOUT):
            replace_traces(self.client, self.experiment(source), link.run_id, kind, [])
        self.client.delete_run(link.run_id)
        return self._create(source)

    def _add_params(self, link: Link, wanted: dict[str, str]) -> None:
        """Add missing parameters."""
        from mlflow.entities import Param

        missing = [Param(name, value) for name, value in sorted(wanted.items()) if name not in link.params]
        for batch in _batches(missing, _PARAMS_PER_CALL):
            self.client.log_batch(link.run_id, params=batch)
            link.params |= {param.key: param.value for param in batch}

    def _add_metrics(self, link: Link, source: RecordedRun, model_id: str | None) -> None:
        """Add missing metric values in the order of the charts; results of the evaluation are the model's as well.

        MLflow's comparison of two runs opens on the metric that was added first.
        """
        from mlflow.entities import Metric

        wanted = _stored_names(source.timings | source.metrics)
        missing = [
            Metric(
                name,
                value,
                source.times.get(step, step),
                step,
                model_id=model_id if name.startswith(RESULT) else None,
                run_id=link.run_id,
            )
            for (name, step), value in wanted.items()
            if (name, step) not in link.values
        ]
        headline = describe.headline_metric(describe.present_params(self.project_root))
        missing.sort(key=lambda metric: (metric.step, chart_order(metric.key, headline)))
        for batch in _batches(missing, _METRICS_PER_CALL):
            self.client.log_batch(link.run_id, metrics=batch)
            link.values |= {(metric.key, metric.step): metric.value for metric in batch}

    def _add_ranked(self, link: Link, source: RecordedRun) -> None:
        """Give a ranked run its headline measure. MLflow keeps every value, so a run that is ranked no longer gets a NaN after it."""
        from mlflow.entities import Metric

        if source.place is None:  # not compared yet, or read without its comparison
            return
        wanted = describe.ranked_values(source)
        steps = {name: step for name, step in sorted(link.values) if name.startswith(RANKED)}
        changes = []
        for name in sorted(steps.keys() | wanted.keys()):
            value, last = wanted.get(name, math.nan), steps.get(name, -1)
            if last < 0 or not _equal(value, link.values[name, last]):
                changes.append(Metric(name, value, source.stopped() or 0, last + 1, run_id=link.run_id))
        if changes:
            self.client.log_batch(link.run_id, metrics=changes)
            link.values |= {(metric.key, metric.step): metric.value for metric in changes}

    def _add_traces(self, link: Link, source: RecordedRun, model_id: str | None) -> None:
        """Make the first answers of the run's evaluation, and chosen answers of its training steps, its traces."""
        params, experiment = describe.present_params(self.project_root), self.experiment(source)
        if source.evaluation is not None:
            evaluated = evaluated_answers(source, link.run_id, model_id, params.tracking.traces)
            replace_traces(self.client, experiment, link.run_id, EVALUATED, evaluated)
        if has_rollouts(source):
            kept = rollout_answers(source, link.run_id, model_id, params)
            replace_traces(self.client, experiment, link.run_id, ROLLOUT, kept)

    def _add_tags(self, run_id: str, present: dict[str, str], wanted: dict[str, str]) -> None:
        """Add missing or changed tags."""
        from mlflow.entities import RunTag

        missing = [RunTag(name, value) for name, value in sorted(wanted.items()) if present.get(name) != value]
        for batch in _batches(missing, _PARAMS_PER_CALL):
            self.client.log_batch(run_id, tags=batch)
            present |= {tag.key: tag.value for tag in batch}

    def _end(self, link: Link, source: RecordedRun) -> None:
        """Set the final status."""
        if source.status == RUNNING:
            return
        if source.status == FINISHED and link.tags.pop(describe.REASON_TAG, ""):
            self.client.delete_tag(link.run_id, describe.REASON_TAG)
        if link.status != source.status:
            self.client.set_terminated(link.run_id, source.status, source.stopped() or int(time.time() * 1000))
            link.status = source.status
        self._add_tags(link.run_id, link.tags, {describe.JOURNAL_TAG: source.digest})

    def _search(self, experiments: list[str], query: str) -> list[MlflowRun]:
        """Return all MLflow runs that match the query."""
        from mlflow.entities import ViewType

        found: list[MlflowRun] = []
        token = None
        while True:
            page = self.client.search_runs(experiments, query, ViewType.ALL, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found


def project(folder: Path, client: MlflowClient, root: Path) -> str:
    """Copy the journal in one folder and return the MLflow run id."""
    source = load(folder)
    if source is None:
        raise TrackingError(
            f"{folder}: no journal with a start record, so there is nothing to copy; run its step first."
        )
    return Projector(client, root).project(source)


def _complete(run: MlflowRun, source: RecordedRun) -> bool:
    """Return True if everything was copied; also for a run of a different checkout, or one deleted by hand."""
    return run.info.status == source.status != RUNNING and run.data.tags.get(describe.JOURNAL_TAG) == source.digest


def _contradicts(link: Link, source: RecordedRun) -> bool:
    """Return True if the store holds a value that the journal does not have."""
    wanted = _stored_names(source.metrics)
    if any(not _equal(wanted[key], value) for key, value in link.values.items() if key in wanted):
        return True
    params = describe.parameters(source)
    if any(params.get(name, value) != value for name, value in link.params.items()):
        return True
    if source.status != FINISHED:
        # A resumed run repeats the steps after its checkpoint; until then the store may be ahead of the journal.
        return False
    timings = {name for name in link.tags.get(describe.TIMINGS_TAG, "").split(",") if name}
    timings |= {describe.entity_name(name) for name, _ in source.timings}
    return any(
        key not in wanted and key[0] not in timings and not key[0].startswith((RESULT, OLD_RESULT, RANKED))
        for key in link.values
    )


def _stored_names(values: dict[Value, float]) -> dict[Value, float]:
    """Return the values under the names that MLflow accepts."""
    return {(describe.entity_name(name), step): value for (name, step), value in values.items()}


def _equal(ours: float, stored: float) -> bool:
    """Return True if the values are equal; MLflow stores an infinity as the largest double."""
    if math.isinf(ours) and abs(stored) == _LARGEST_DOUBLE:
        return (ours > 0) == (stored > 0)
    return ours == stored or (math.isnan(ours) and math.isnan(stored))


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of at most `size`."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]

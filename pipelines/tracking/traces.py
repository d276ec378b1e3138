"""Write answers as MLflow traces: prompt, answer, rewards, and the run and weights that they belong to.

A trace's id is computed from the answer's key, so that a repeated or interrupted copy leaves exactly one trace for each answer.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.runtime.redaction import redacted
from pipelines.tracking.source import RecordedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Span, Trace, TraceInfo

KIND_TAG = "posttrain.trace"
EVALUATED, ROLLOUT, SERVED = "evaluation", "rollout", "served"
"""Values of KIND_TAG: answers of an evaluation, of training steps, and of `posttrain serve`."""
SAMPLES = "samples"
"""Table of an evaluation with its first greedy answers."""
_PAGE, _PREVIEW, _TAG = 500, 1000, 8000


@dataclass(frozen=True)
class TracedAnswer:
    """One answer to be shown as a trace.

    Attributes:
        key: identifies the answer; equal keys make one trace.
        started, ended: milliseconds since the epoch.
        run_id, model_id: the MLflow run and logged model that the trace is listed with; "" for none.
        scores: rewards by name, shown as assessments.
    """

    key: str
    kind: str
    name: str
    prompt: Any
    answer: str
    started: int
    ended: int
    run_id: str = ""
    model_id: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def trace_id(self) -> str:
        """Return MLflow's id of the trace."""
        return f"tr-{_hash(self.key, 32)}"


def evaluated_answers(source: RecordedRun, run_id: str, model_id: str | None, count: int) -> list[TracedAnswer]:
    """Return the first `count` greedy answers of a run's evaluation; none before it has been evaluated."""
    evaluation = source.evaluation
    if evaluation is None or not count:
        return []
    # a restored journal has no times
    at = evaluation.stopped() or source.stopped() or int(time.time() * 1000)
    given = {**source.start.get("arguments", {}), "model": evaluation.start["arguments"].get("model")}
    tags = {name: str(value) for name, value in given.items() if value not in (None, "")}
    found = []
    for number, row in enumerate(_samples(evaluation)[:count]):
        scores = {k: float(v) for k, v in row.items() if k not in ("prompt", "completion") and _is_number(v)}
        key = f"{EVALUATED}/{run_id}/{evaluation.digest}/{number}"
        found.append(
            TracedAnswer(key, EVALUATED, f"evaluate {given['model']}", row["prompt"], row["completion"], at, at, run_id,
                         model_id or "", tags, scores)
        )  # fmt: skip
    return found


def write_traces(client: MlflowClient, experiment: str, answers: Sequence[TracedAnswer]) -> None:
    """Add the traces that the store does not hold yet."""
    present = set(_present(client, experiment, answers))
    add_traces(client, experiment, [answer for answer in answers if answer.trace_id not in present])


def add_traces(client: MlflowClient, experiment: str, answers: Sequence[TracedAnswer]) -> None:
    """Add traces without asking which ones are stored; one that is stored stays as it is."""
    from mlflow.tracing.client import TracingClient

    store = TracingClient(client.tracking_uri)
    for answer in answers:
        # the spans come first: a trace is found by its tags only after its text is there
        store.log_spans(experiment, [_span(answer)])
        store.start_trace(_info(answer, experiment))


def replace_traces(
    client: MlflowClient, experiment: str, run_id: str, kind: str, answers: Sequence[TracedAnswer]
) -> None:
    """Make `answers` a run's traces of one kind: add missing ones, and delete earlier ones."""
    write_traces(client, experiment, answers)
    wanted = {answer.trace_id for answer in answers}
    query = f"metadata.`mlflow.sourceRun` = '{run_id}' and tags.`{KIND_TAG}` = '{kind}'"
    stored = (trace.info.trace_id for trace in search(client, [experiment], query, spans=False))
    delete_traces(client, experiment, [name for name in stored if name not in wanted])


def delete_traces(client: MlflowClient, experiment: str, trace_ids: Sequence[str]) -> None:
    """Delete traces with their spans and assessments."""
    for begin in range(0, len(trace_ids), 100):
        client.delete_traces(experiment, trace_ids=list(trace_ids[begin : begin + 100]))


def search(client: MlflowClient, experiments: Sequence[str], query: str | None, *, spans: bool) -> Iterator[Trace]:
    """Yield the traces of experiments that match a query."""
    token = None
    while True:
        page = client.search_traces(
            locations=list(experiments), filter_string=query, max_results=_PAGE, page_token=token, include_spans=spans
        )
        yield from page
        token = page.token
        if not token:
            return


def _present(client: MlflowClient, experiment: str, answers: Sequence[TracedAnswer]) -> Iterator[str]:
    """Yield the ids of the stored traces of the same kinds as the answers, and of their runs if they belong to one."""
    for kind, run_id in sorted({(a.kind, "" if a.kind == SERVED else a.run_id) for a in answers}):
        query = f"tags.`{KIND_TAG}` = '{kind}'" + (f" and metadata.`mlflow.sourceRun` = '{run_id}'" if run_id else "")
        yield from (trace.info.trace_id for trace in search(client, [experiment], query, spans=False))


def _info(answer: TracedAnswer, experiment: str) -> TraceInfo:
    """Return the head of a trace: what MLflow's table of traces shows."""
    from mlflow.entities import (
        Assessment,
        AssessmentSource,
        AssessmentSourceType,
        Feedback,
        TraceInfo,
        TraceLocation,
        TraceState,
    )
    from mlflow.entities.trace_location import MlflowExperimentLocation, TraceLocationType

    by_reward = AssessmentSource(source_type=AssessmentSourceType.CODE, source_id="posttrain")
    scores: list[Assessment] = [
        Feedback(
            name=name,
            value=value,
            source=by_reward,
            trace_id=answer.trace_id,
            create_time_ms=answer.ended,
            last_update_time_ms=answer.ended,
        )
        for name, value in sorted(answer.scores.items())
    ]
    for score in scores:
        score.assessment_id = f"a-{_hash(f'{answer.key}/{score.name}', 32)}"
    metadata = {"mlflow.sourceRun": answer.run_id, "mlflow.modelId": answer.model_id}
    tags = {"mlflow.traceName": answer.name, KIND_TAG: answer.kind, **answer.tags}
    shown = redacted({"prompt": answer.prompt, "answer": answer.answer})
    return TraceInfo(
        trace_id=answer.trace_id,
        trace_location=TraceLocation(
            TraceLocationType.MLFLOW_EXPERIMENT, mlflow_experiment=MlflowExperimentLocation(experiment)
        ),
        request_time=answer.started,
        state=TraceState.OK,
        request_preview=_text(shown["prompt"])[:_PREVIEW],
        response_preview=shown["answer"][:_PREVIEW],
        execution_duration=answer.ended - answer.started,
        trace_metadata={name: value for name, value in metadata.items() if value},
        tags={name: str(redacted(value))[:_TAG] for name, value in tags.items()},
        assessments=scores,
    )


def _span(answer: TracedAnswer) -> Span:
    """Return the only span of a trace, with the whole prompt and answer."""
    from mlflow.entities import Span

    attributes = redacted({
        "mlflow.spanInputs": {"prompt": answer.prompt},
        "mlflow.spanOutputs": {"completion": answer.answer},
        "mlflow.spanType": "LLM",
    })  # fmt: skip
    attributes["mlflow.traceRequestId"] = answer.trace_id
    return Span.from_dict({
        "trace_id": answer.trace_id,
        "span_id": _hash(answer.key, 16),
        "parent_span_id": None,
        "name": answer.name,
        "start_time_unix_nano": answer.started * 1_000_000,
        "end_time_unix_nano": answer.ended * 1_000_000,
        "status": {"code": "OK", "message": ""},
        "events": [],
        "attributes": {name: json.dumps(value, ensure_ascii=False) for name, value in attributes.items()},
    })  # fmt: skip


def texts_of(trace: Trace) -> list[str]:
    """Return every text of a trace that may quote a row: prompt, answer, previews and assessments."""
    spans = [json.dumps([span.inputs, span.outputs], ensure_ascii=False) for span in trace.data.spans]
    notes = [json.dumps(each.to_dictionary(), ensure_ascii=False) for each in trace.info.assessments]
    return [*spans, *notes, trace.info.request_preview or "", trace.info.response_preview or ""]


def _samples(evaluation: RecordedRun) -> list[dict[str, Any]]:
    """Return the rows of the evaluation's table of samples; none if its file is gone."""
    paths = [evaluation.folder / record["path"] for record in evaluation.of("table") if record["name"] == SAMPLES]
    rows: list[dict[str, Any]] = json.loads(paths[0].read_bytes()) if paths and paths[0].is_file() else []
    return rows


def _text(prompt: Any) -> str:
    """Return a prompt as text; messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]

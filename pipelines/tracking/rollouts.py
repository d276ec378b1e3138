"""Show the answers of a run's training steps as MLflow traces: the best, the worst, and those that moved or fooled most."""

from __future__ import annotations

import math
import time
from fnmatch import fnmatch

from pipelines.config.params import Params
from pipelines.runtime.journal import FINISHED
from pipelines.runtime.kept_answers import PATTERN, kept_answers
from pipelines.tracking.source import RecordedRun
from pipelines.tracking.traces import ROLLOUT, TracedAnswer
from posttrain.errors import DataError, TrackingError

LOG_RATIO = "log_ratio"
"""Name of the assessment with log p minus log p of the reference, in nats."""


def has_rollouts(source: RecordedRun) -> bool:
    """Return True if a finished run kept tables of rollouts."""
    paths = (str(record["path"]) for record in source.of("artifact"))
    return source.status == FINISHED and any(fnmatch(path.rpartition("/")[2], PATTERN) for path in paths)


def rollout_answers(source: RecordedRun, run_id: str, model_id: str | None, params: Params) -> list[TracedAnswer]:
    """Return the answers of a run to show: `tracking.traces` of each kind; none if it kept no rollouts.

    Raises:
        TrackingError: a table of the run cannot be read.
    """
    count = params.tracking.traces
    if not count or not has_rollouts(source):
        return []
    # a restored journal has no times
    stopped = source.stopped() or int(time.time() * 1000)
    given = {name: str(value) for name, value in source.start.get("arguments", {}).items() if value not in (None, "")}
    models = [name for name, section in params.rewards.items() if section.function == "reward_model"]
    try:
        chosen = kept_answers(source.folder, params.evaluation.accuracy, models, count)
    except DataError as error:
        raise TrackingError(str(error)) from error
    found = []
    for answer in chosen:
        scores = {**answer.rewards, "total": answer.reward, LOG_RATIO: answer.log_ratio}
        at = source.times.get(answer.step, stopped)
        found.append(
            TracedAnswer(
                key=f"{ROLLOUT}/{run_id}/{answer.kind}/{answer.step}/{answer.row}",
                kind=ROLLOUT,
                name=f"{answer.kind}, step {answer.step}",
                prompt=answer.prompt,
                answer=answer.completion,
                started=at,
                ended=at,
                run_id=run_id,
                model_id=model_id or "",
                tags=given | {"chosen": answer.kind, "step": str(answer.step)},
                scores={name: value for name, value in scores.items() if math.isfinite(value)},
            )
        )
    return found

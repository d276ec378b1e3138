"""Show answers of the training steps, from the tables of rollouts that runs kept."""

from __future__ import annotations

from pipelines.report.analysis import Question
from pipelines.report.load import Results
from pipelines.runtime.kept_answers import KeptAnswer, kept_answers

SHOWN = 2
"""Answers of each kind."""


def training_answers(results: Results, question: Question) -> dict[str, list[KeptAnswer]]:
    """Return the chosen answers of each algorithm's first run; algorithms whose run kept no rollouts are left out.

    Raises:
        DataError: a table of a run cannot be read.
    """
    runs = {name: results.of(name)[0].training for name in results.algorithms}
    found = {
        name: kept_answers(run.folder, question.accuracy, question.reward_models, SHOWN)
        for name, run in runs.items()
        if run is not None
    }
    return {name: answers for name, answers in found.items() if answers}

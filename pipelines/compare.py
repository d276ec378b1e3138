"""Compare all algorithms: intervals, paired tests, learning curves and samples, as one page in report/.

    python -m pipelines.compare

Reads the finished runs of base, sft, reward and of every algorithm and seed in params.yaml. Nothing in report/ depends on the clock or
the machine, unless report.currency is wall_time; times and memory are on a separate page, .posttrain/costs/index.html, and in
.posttrain/report.html, a copy of the report.
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config.params import Params, load_params
from pipelines.report.load import load, wanted
from pipelines.report.measured import all_runs, training_seconds
from pipelines.runtime.measures import headline_name
from pipelines.runtime.ranking import RECORD, encode, places
from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from posttrain.errors import DataError

if TYPE_CHECKING:
    from pipelines.report.analysis import Comparison, Question
    from pipelines.report.load import Results

FOLDER = Path("report")
READ = ("project", "report", "evaluation.accuracy", "evaluation.rewards", "evaluation.pass_k", "rewards")


def run(run: Run) -> None:
    """Compute the comparison, write the report and record the results."""
    # SciPy and matplotlib take a second; a process that hands this step over to the fork server does not need them.
    from pipelines.report.analysis import compare
    from pipelines.report.costs import write_costs
    from pipelines.report.words import solved
    from pipelines.report.write import write

    params = run.context.params
    project, settings = params.project, params.report
    question = question_of(params)
    results = load(project.algorithms, project.seeds)
    seconds = None
    if question.currency == "wall_time":
        seconds = training_seconds(all_runs(Path()), project.algorithms, project.seeds)
        if not seconds:
            raise DataError(
                "report.currency is wall_time, but no algorithm has all its runs timed on this machine: they were restored or"
                " trained elsewhere. Choose another budget, for example: posttrain configure report.currency=tokens_sampled"
            )
    comparison = compare(results, question, seconds)
    write(FOLDER, results, comparison, settings.samples_shown, settings.seed)
    measure = headline_name(question.headline)
    levels = {f"{measure}/{summary.name}": summary.headline.value for summary in comparison.summaries}
    significant = sum(pair.significant for pair in comparison.pairs)
    run.recorder.summary(levels | {"pairs/significant": significant, "pairs/tested": len(comparison.pairs)})
    run.recorder.tag("solved", solved(comparison))
    run.recorder.tag(RECORD, ranking(results, comparison))
    for picture in sorted(FOLDER.glob("*.png")):
        run.outputs.artifact(picture.name).write_bytes(picture.read_bytes())
    run.outputs.artifact("report.html").write_bytes((FOLDER / "index.html").read_bytes())
    if "POSTTRAIN_FLOW_RUN" not in os.environ:  # a flow writes the page at its end, with the times of all its stages
        write_costs(Path())


def ranking(results: Results, comparison: Comparison) -> str:
    """Return the place of each run's algorithm, as the journal carries it to MLflow."""
    from pipelines.report.words import ranked

    levels = {summary.name: summary.headline.value for summary in ranked(comparison)}
    place = places(levels, comparison.apart(), levels)
    by_run = {m.training.identity: place[m.group] for m in results.models if m.training is not None}
    return encode(headline_name(comparison.question.headline), by_run)


def question_of(params: Params) -> Question:
    """Return the settings of the comparison from the parameters."""
    from pipelines.report.analysis import Question
    from posttrain.evaluation.statistics import Resampling

    evaluation, settings = params.evaluation, params.report
    sources = tuple(evaluation.rewards)
    return Question(
        accuracy=evaluation.accuracy,
        rewards=sources,
        reward_models=tuple(name for name in sources if params.rewards[name].function == "reward_model"),
        pass_k=tuple(sorted(set(evaluation.pass_k))),
        resampling=Resampling(settings.bootstrap, settings.level(len(params.project.seeds)), settings.seed),
        headline=settings.headline,
        currency=settings.currency,
        looks=settings.looks,
    )


def inputs(args: Namespace) -> list[str]:
    """Return exactly the runs of the configured algorithms and seeds; unrelated runs are ignored."""
    params = load_params(args.params)
    return [path.as_posix() for path in wanted(params.project.algorithms, params.project.seeds)]


if __name__ == "__main__":
    main(run, "compare", params=READ, inputs=inputs)

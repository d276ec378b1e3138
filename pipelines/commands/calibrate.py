"""Compare every algorithm with itself (A/A): how often would the report call copies different?

    posttrain calibrate                       # the algorithms and seeds of params.yaml
    posttrain calibrate --sides 3 5 10        # seeds on each side

Reads finished evaluations (runs/evaluate). The seeds of each algorithm are split into two sides, and the sides are compared as
the report compares algorithms. A method that holds its level calls at most 5 % of such pairs different. 2k seeds are needed for k
a side: set project.seeds to 0 … 19 and run `make demo` for 3, 5 and 10.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.compare import question_of
from pipelines.config.params import Params, load_params
from pipelines.report.analysis import scored
from pipelines.report.calibration import Rate, power_lines, rates, simulated
from pipelines.report.load import load
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, reports_errors, whole
from posttrain.errors import DataError
from posttrain.evaluation.crossed import Groups, Spread
from posttrain.evaluation.statistics import Floats, Resampling


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = command_parser("posttrain calibrate", __doc__)
    parser.add_argument("--params", type=Path, help="parameters to use instead of the project's params.yaml")
    parser.add_argument("--sides", type=whole(1, 10_000), nargs="+", default=[1, 3, 5, 10], help="seeds on each side")
    args = parser.parse_args(arguments)
    path = args.params.resolve() if args.params else environment.root() / "params.yaml"
    os.chdir(environment.root())
    params = load_params(path)
    scores, groups = measured(params)
    print(page(params, scores, args.sides, groups))
    return 0


def tables(params: Params) -> dict[str, Floats]:
    """Return each algorithm's headline scores, [prompts, seeds]. Raises DataError if there are fewer than 2 seeds."""
    return measured(params)[0]


def measured(params: Params) -> tuple[dict[str, Floats], Groups]:
    """Return each algorithm's headline scores, [prompts, seeds], and the groups of the prompts, None if they are independent.

    Prompts without a score from some run are left out. Raises DataError if there are fewer than 2 seeds.
    """
    project = params.project
    if len(project.seeds) < 2:
        raise DataError(
            f"calibrate: project.seeds has {len(project.seeds)} seed; copies of an algorithm are runs with other seeds. Set"
            " project.seeds to [0, 1, …, 9] or more and run `make demo` first."
        )
    results = load(project.algorithms, project.seeds)
    question = question_of(params)
    found = {name: scored(results.of(name), question) for name in project.algorithms}
    complete = np.all([np.isfinite(table).all(1) for table in found.values()], axis=0)
    groups = results.prompts.groups
    return {name: table[complete] for name, table in found.items()}, None if groups is None else np.asarray(groups)[
        complete
    ]


def power(params: Params) -> str:
    """Report the differences that the present seeds and prompts can show, from finished runs, or the command to measure them."""
    try:
        scores, groups = measured(params)
    except DataError:
        return (
            "What these seeds can show is not known yet: it follows from finished runs with 2 or more seeds. A pilot is"
            " `make demo SEEDS=2`; a larger number later trains only the seeds that are new."
        )
    spreads = [_spread(scores, name, groups) for name in scores]
    widest = max(spreads, key=lambda spread: spread.run)
    prompts = min(len(table) for table in scores.values())
    return "\n".join(power_lines(widest, len(params.project.seeds), prompts))


def page(params: Params, scores: dict[str, Floats], sides: Sequence[int], groups: Groups = None) -> str:
    """Write the table of rates, the simulated level and the power as Markdown."""
    draws = Resampling(params.report.bootstrap, params.report.confidence, params.report.seed)
    seeds = len(params.project.seeds)
    lines = [
        f"Each of {len(scores)} algorithms compared with itself, {seeds} seeds each: pairs called different at"
        f" {100 * (1 - draws.confidence):.3g} %",
        "",
        "| method | seeds a side | called different | pairs | 95 % interval (independent pairs) |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_row(rate) for rate in rates(list(scores.values()), sides, draws, groups)]
    for name, table in scores.items():
        spread = _spread(scores, name, groups)
        level = {k: simulated(spread, k, len(table), draws.confidence) for k in sides if k > 1}
        shares = ", ".join(f"{100 * share:.1f} % at {k}" for k, share in level.items())
        apart = 100 * float(table.mean(0).std(ddof=1))
        lines += [
            "",
            f"{name}: accuracy {100 * table.mean():.1f} %, standard deviation between seeds {apart:.1f} points; simulated with its"
            f" variances, equal copies differ in {shares} seeds",
            *(f"- {line}" for line in power_lines(spread, seeds, len(table))),
        ]
    return "\n".join(lines)


def _spread(scores: dict[str, Floats], name: str, groups: Groups) -> Spread:
    own = Spread.of(scores[name], scores[name], groups)
    return Spread(own.run, _between(scores, name, groups), own.rest)


def _between(scores: dict[str, Floats], name: str, groups: Groups) -> float:
    """Return the variance between prompts of the difference to the other algorithms, the mean over them."""
    others = [Spread.of(scores[name], table, groups).prompt for other, table in scores.items() if other != name]
    return float(np.mean(others)) if others else 0.0


def _row(rate: Rate) -> str:
    low, high = rate.interval
    return (
        f"| {rate.method} | {rate.seeds} | {100 * rate.share:.1f} % | {rate.pairs} |"
        f" {100 * low:.1f} to {100 * high:.1f} % ({rate.independent}) |"
    )


if __name__ == "__main__":
    sys.exit(main())

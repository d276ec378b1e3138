"""Decide if the best aligned model may replace the champion. Both answer the same held-out prompts with the same seeds.

    python -m pipelines.gate                                   against the supervised model, if there is no champion
    python -m pipelines.gate --champion models/champion --champion-name "version 3"

Reads the finished evaluations, answers once more with the champion's weights, and writes runs/gate: decision.json, and
decision.html for people. Candidates are asked in the order of their true reward; the first that passes every check wins. A candidate
whose answers cannot be used is refused with the reason and does not stop the others.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config.gate_schema import GateParams
from pipelines.config.params import Params, load_params
from pipelines.promotion.decision import (
    BenchmarkMargin,
    Decision,
    GateLimits,
    SampledAnswers,
    cautious,
    decide,
    not_judged,
)
from pipelines.promotion.drift import arriving
from pipelines.promotion.growth import by_age, mark
from pipelines.promotion.page import page
from pipelines.promotion.people import preferred, with_people
from pipelines.report.load import BENCHMARKS, PREDICTIONS, RUNS, SFT, benchmark_scores, predictions
from pipelines.runtime.journal import representable
from pipelines.runtime.publish import ARTIFACTS
from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from pipelines.training.answer_scores import REWARD, Score, has_reward_model, reward_scores
from pipelines.training.benchmark_table import write_scores
from pipelines.training.evaluator import TASKS, Evaluator, write_predictions
from posttrain.errors import DataError
from posttrain.evaluation.statistics import Floats, Resampling, floats

DECISION = RUNS / "gate" / ARTIFACTS / "decision.json"
PAGE = RUNS / "gate" / ARTIFACTS / "decision.html"
READ = ("gate", "project", "evaluation", "rewards", "report", "data")


def run(run: Run) -> None:
    """Check all candidates, and record the decision."""
    params, args = run.context.params, run.context.args
    settings = params.report
    names = args.candidates or aligned(params.project.algorithms, params.project.seeds)
    reference = _answers(params, args.champion_name or "the supervised model", _reference(run))
    resampling = cautious(Resampling(settings.bootstrap, params.gate.confidence, settings.seed), len(names))
    people = {name: preferred(Path(), name, args.champion) for name in names}
    decisions = [
        with_people(decision, people[decision.challenger], params.gate.people)
        for decision in _judged(params, names, reference, resampling, args.earlier)
    ]
    drifts = arriving(Path(), params, _exceeded, _scorer if has_reward_model() else None)
    rates = [rate for rate in people.values() if rate is not None]
    chosen = next((decision for decision in decisions if decision.promote), decisions[0])
    record = _record(chosen, decisions) | {"drift": [drift.record() for drift in drifts]}
    record["people"] = [asdict(rate) for rate in rates]
    record["evaluation"] = mark(reference.prompts)
    run.outputs.artifact(DECISION.name).write_text(
        json.dumps(representable(record), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    run.outputs.artifact(PAGE.name).write_text(page(chosen, decisions, drifts, rates), encoding="utf-8")
    run.recorder.summary(
        {"promote": float(chosen.promote), "detectable": chosen.detectable}
        | {check.name: check.value for check in chosen.checks}
    )
    run.recorder.tag("challenger", chosen.challenger)
    run.recorder.tag("decision", "promote" if chosen.promote else "refuse")
    print(
        f"gate: {'promote' if chosen.promote else 'refuse'} {chosen.challenger} against {chosen.reference}", flush=True
    )
    for drift in drifts:
        print(f"gate: {drift.words}", flush=True)
    for check in chosen.checks:
        print(f"gate: {'passed' if check.passed else 'FAILED'}  {check.name}: {check.words}", flush=True)


def _exceeded(measures: Mapping[str, tuple[float, float]]) -> list[str]:
    from pipelines.validation.drift import exceeded  # Great Expectations takes seconds to import

    return exceeded(measures)


def _scorer() -> Score:
    return reward_scores(skip_long=True)


def _judged(
    params: Params, names: Sequence[str], reference: SampledAnswers, resampling: Resampling, earlier: str | None = None
) -> list[Decision]:
    """Decide about every candidate, the best mean difference first. Raises DataError if no candidate can be judged.

    `earlier` is the mark of the evaluation by which the champion was judged, None if it is unknown.
    """
    limits, decisions, unusable = _limits(params.gate), [], []
    for name in names:
        try:
            answers = _answers(params, name, evaluated(name))
            decision = decide(answers, reference, limits, resampling)
            aged = () if earlier is None else by_age(answers, reference, earlier, resampling)
            decisions.append(replace(decision, by_age=aged))
        except DataError as error:
            unusable.append(not_judged(name, reference.name, str(error)))
    if not decisions:
        raise DataError("no candidate can be judged: " + "; ".join(d.checks[0].words for d in unusable))
    return [*sorted(decisions, key=lambda decision: -decision.difference.value), *unusable]


def _reference(run: Run) -> Path:
    """Return the file of the champion's answers to the same table, with the same seeds, as the candidates' evaluations.

    Its benchmarks, if the gate has some, are written next to it, as those of an evaluation.
    """
    champion, params = run.context.args.champion, run.context.params
    if champion is None:
        return evaluated(SFT)
    path = run.outputs.artifact("champion.parquet")
    evaluator = Evaluator(run.context, run.recorder, Path(champion))
    write_predictions(path, evaluator.answers())
    if params.gate.benchmarks and params.evaluation.benchmarks is not None:
        resampling = Resampling(params.report.bootstrap, params.gate.confidence, params.report.seed)
        write_scores(path.with_name(BENCHMARKS), evaluator.benchmarks(params.evaluation.benchmarks), resampling)
    return path


def _answers(params: Params, name: str, path: Path) -> SampledAnswers:
    """Return the sampled answers in a file, and the rewards that `report.headline` ranks by; column 0 holds the greedy answer."""
    evaluation, form, found = params.evaluation, params.gate.format, predictions(path)
    greedy = params.report.headline == "greedy"
    numbers = {key: values[:, 1:] for key, values in found.numbers.items()}
    missing = sorted(source for source in evaluation.rewards if f"reward_{source}" not in numbers)
    if missing:
        raise DataError(
            f"the evaluation of {name} has no rewards {', '.join(missing)}, so it cannot be compared; evaluate again: `dvc repro`"
        )
    models = [source for source in evaluation.rewards if params.rewards[source].function == "reward_model"]
    return SampledAnswers(
        name,
        tuple(zip(found.prompt_ids, found.prompts, found.answers, strict=True)),
        reward=found.numbers[f"reward_{evaluation.accuracy}"][:, 0:1]
        if greedy
        else numbers[f"reward_{evaluation.accuracy}"],
        scores={source: numbers[f"reward_{source}"] for source in models if source != evaluation.accuracy},
        kl=numbers["kl"],
        tokens=numbers["tokens"],
        truncated=numbers["truncated"],
        formatted=None
        if form is None
        else np.array([[bool(re.search(form.pattern, text)) for text in row[1:]] for row in found.completions], float),
        benchmarks=_benchmarks(params, path),
        groups=found.groups,
    )


def _benchmarks(params: Params, path: Path) -> dict[tuple[str, str], Floats]:
    """Return a model's benchmarks, values over documents by task and metric, from next to its answers; none if the gate has none."""
    if not params.gate.benchmarks:
        return {}
    return {key: floats(row["documents"]) for key, row in benchmark_scores(path.with_name(BENCHMARKS)).items()}


def _limits(gate: GateParams) -> GateLimits:
    """Return the gate's limits from the parameters."""
    return GateLimits(
        gate.tolerated_loss,
        gate.max_kl,
        gate.max_length_ratio,
        gate.max_truncated,
        gate.max_divergence,
        gate.min_prompts,
        gate.max_missing,
        None if gate.format is None else gate.format.min_share,
        tuple(BenchmarkMargin(**limit.model_dump()) for limit in gate.benchmarks),
    )


def _record(chosen: Decision, decisions: Sequence[Decision]) -> dict[str, Any]:
    """Return the content of decision.json."""
    return {
        "promote": chosen.promote,
        "challenger": chosen.challenger,
        "reference": chosen.reference,
        "refusals": chosen.refusals,
        "reward_gain": asdict(chosen.difference),
        "by_age": list(chosen.by_age),
        "power": {"level": chosen.level, "detectable": chosen.detectable},
        "candidates": [
            {"name": d.challenger, "promote": d.promote, "checks": [asdict(check) for check in d.checks]}
            for d in decisions
        ],
    }


def aligned(algorithms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Return the name of every model of the align matrix."""
    return [f"{algorithm}-{seed}" for algorithm in algorithms for seed in seeds]


def evaluated(model: str) -> Path:
    """Return the path of a model's predictions."""
    return RUNS / "evaluate" / model / ARTIFACTS / PREDICTIONS


def arguments(parser: ArgumentParser) -> None:
    """Add the step's arguments."""
    parser.add_argument(
        "--champion", help="folder of the champion's model (default: compare with the supervised model)"
    )
    parser.add_argument("--champion-name", help="name of the champion on the page")
    parser.add_argument(
        "--earlier", help="mark of the evaluation by which the champion was judged; rows since then are shown apart"
    )
    parser.add_argument("--candidates", nargs="+", help="aligned models to check (default: all of params.yaml)")


def inputs(args: Namespace) -> list[str]:
    """Return the evaluations and models that the gate reads."""
    params = load_params(args.params)
    names = args.candidates or aligned(params.project.algorithms, params.project.seeds)
    answers = [evaluated(name) for name in (*names, *([] if args.champion else [SFT]))]
    if params.gate.benchmarks:
        # a candidate without them is refused by name later
        answers += [path for path in (answer.with_name(BENCHMARKS) for answer in answers) if path.is_file()]
    champion = [args.champion, "models/sft", "data/valid/evaluation.parquet"] if args.champion else []
    reward = [REWARD.as_posix()] if args.champion or has_reward_model() else []
    tasks = [str(TASKS)] if args.champion and params.gate.benchmarks else []
    return [*map(str, answers), *champion, *reward, *tasks]


if __name__ == "__main__":
    main(run, "gate", params=READ, inputs=inputs, arguments=arguments)

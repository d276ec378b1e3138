"""Evaluate one model: greedy and sampled answers on held-out problems, every reward, KL to the supervised policy, intervals.

    python -m pipelines.evaluate --model sft
    python -m pipelines.evaluate --model grpo-0

All models answer the same prompts with the same seeds, so that comparisons are paired.
"""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.own_code import evaluation_code
from pipelines.config.params import load_params
from pipelines.config.schema import RewardFunctionParams
from pipelines.data.tables import plain
from pipelines.runtime.measures import GREEDY, SAMPLED
from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from pipelines.training.evaluator import REFERENCE, TASKS, Evaluator, write_predictions
from pipelines.training.reward_record import EVALUATION, check_record, reward_inputs
from pipelines.training.setup import peak_memory_mib
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.evaluation.answers import EvaluatedAnswer
    from posttrain.evaluation.statistics import Interval, Resampling


def run(run: Run) -> None:
    """Evaluate the model and record predictions and results."""
    check_record(run.context, EVALUATION)
    params = run.context.params.evaluation
    from pipelines.training.benchmark_table import BENCHMARKS, write_scores
    from posttrain.evaluation.statistics import Resampling

    if params.benchmarks is not None:
        from posttrain.evaluation.harness import require_package

        require_package()
    evaluator = Evaluator(run.context, run.recorder, model_folder(run.context.args.model))
    evaluator.check_second_task()
    answers = evaluator.answers()
    write_predictions(run.outputs.artifact("predictions.parquet"), answers, params.groups)
    results = summary(answers, params.accuracy, params.pass_k, Resampling(seed=params.seed))
    results |= answers_not_found(answers, run.context.params.rewards[params.accuracy])
    if params.benchmarks is not None:
        scores = evaluator.benchmarks(params.benchmarks)
        results |= write_scores(run.outputs.artifact(BENCHMARKS), scores, Resampling(seed=params.seed))
    results["preference/accuracy"] = evaluator.preference_accuracy()
    results |= evaluator.second_task()
    run.recorder.table("samples", 0, [_shown(a) for a in answers if a.sample == 0][: params.samples_shown])
    run.recorder.timings(0, {"memory/peak_mib": peak_memory_mib()})
    run.recorder.summary(results)
    run.recorder.tag("model", run.context.args.model)
    if names := without_interval(results):
        run.recorder.tag("no_interval", f"{', '.join(names)}: no interval from equal values")


def summary(
    answers: Sequence[EvaluatedAnswer], accuracy: str, pass_k: Sequence[int], resampling: Resampling
) -> dict[str, float]:
    """Return the values of metrics.json; intervals are over prompts.

    Raises DataError naming a reward that has no value for any answer.
    """
    import numpy as np

    from posttrain.evaluation.statistics import floats, mean_interval, pass_at_k_by_prompt

    greedy = [a for a in answers if a.sample == 0]
    sampled = [a for a in answers if a.sample > 0]
    for source in sorted(answers[0].rewards):
        for kind, some in (("greedy", greedy if source == accuracy else []), ("sampled", sampled)):
            if some and all(a.rewards[source] is None for a in some):
                raise DataError(
                    f"rewards.{source}: has no value for any of the {len(some)} {kind} answers, so it has no mean: it gave None,"
                    " or failed, for all of them. Correct its function, or remove it from evaluation.rewards"
                )
    shape = (len(greedy), len(sampled) // len(greedy))
    interval = mean_interval(floats([a.rewards[accuracy] for a in greedy]), resampling)
    results = _measure(GREEDY, interval)
    grid = floats([a.rewards[accuracy] for a in sampled]).reshape(shape)
    for k in pass_k if np.isin(grid[~np.isnan(grid)], (0.0, 1.0)).all() else ():
        chances = pass_at_k_by_prompt(grid, k)
        if np.isfinite(chances).any():  # a reward that has failed may leave no prompt k known answers
            results[f"pass@{k}"] = float(np.nanmean(chances))
            if (known := int(np.isfinite(chances).sum())) < len(chances):
                results[f"pass@{k}_prompts"] = float(known)
    for source in sorted(answers[0].rewards):
        values = floats([a.rewards[source] for a in sampled]).reshape(shape)
        reward = mean_interval(values, resampling)
        results |= _measure(SAMPLED, reward) if source == accuracy else {}
        results |= {f"reward/{source}/mean": reward.value}
        results |= {f"reward/{source}/low": reward.low, f"reward/{source}/high": reward.high} if reward.known else {}
    return results | {
        "kl/ref_k1": float(np.mean([a.kl for a in sampled])),
        "length/mean": float(np.mean([a.tokens for a in sampled])),
        "length/truncated": float(np.mean([a.truncated for a in sampled])),
        "entropy": float(np.mean([a.entropy for a in sampled])),
        "tokens/sampled": float(sum(a.tokens for a in answers)),
    }


def _measure(name: str, level: Interval) -> dict[str, float]:
    """Return a measure of accuracy and the bounds of its interval, if it has one, by name."""
    return {name: level.value} | ({f"{name}_low": level.low, f"{name}_high": level.high} if level.known else {})


def without_interval(results: Mapping[str, float]) -> list[str]:
    """Return the measures and rewards that have no interval, since all prompts have one value."""
    sources = sorted(name.removesuffix("/mean") for name in results if re.fullmatch("reward/.+/mean", name))
    measures = [name for name in (GREEDY, SAMPLED) if f"{name}_low" not in results]
    return measures + [name for name in sources if f"{name}/low" not in results]


def answers_not_found(answers: Sequence[EvaluatedAnswer], judge: RewardFunctionParams) -> dict[str, float]:
    """Return the share of answers, greedy and sampled, in which the judge found nothing to compare; they count as wrong."""
    from posttrain.rewards.extraction import extracted

    if judge.function != "answer":
        return {}
    options = {name: judge.arguments[name] for name in ("extract", "kind") if name in judge.arguments}
    missing = sum(extracted(answer.text, **options) is None for answer in answers)
    return {"answers/not_found": missing / len(answers)}


def _shown(answer: EvaluatedAnswer) -> dict[str, Any]:
    from posttrain.rollouts.turns import transcript

    shown = transcript(answer.messages) or answer.text
    return {"prompt": plain(answer.problem.prompt), "completion": shown, **answer.rewards}


def model_folder(model: str) -> Path:
    """Return models/base, models/sft, or models/align/{algorithm}-{seed}."""
    return Path("models", model) if model in ("base", "sft") else Path("models", "align", model)


def arguments(parser: ArgumentParser) -> None:
    """Add the step's arguments."""
    parser.add_argument("--model", default="", help="base, sft, or the name of an aligned model, e.g. grpo-0")
    parser.add_argument(
        "--algorithm", dest="model", metavar="NAME", action=ModelPart, help="algorithm of an aligned model, with --seed"
    )
    parser.add_argument("--seed", dest="model", metavar="SEED", action=ModelPart, help="seed of an aligned model")


class ModelPart(Action):
    """Join `--algorithm grpo --seed 0` to the model `grpo-0`."""

    def __call__(self, parser: ArgumentParser, args: Namespace, value: Any, option: str | None = None) -> None:
        parts = [str(value), args.model] if args.model.isdecimal() else [args.model, str(value)]
        args.model = "-".join(filter(None, parts))


def variant(args: Namespace) -> str:
    """Return the model's name. Raises ConfigError if it is not a model of the project."""
    if not args.model:
        raise ConfigError(
            "no model is named; give --model base, --model sft, or --algorithm and --seed of an aligned model"
        )
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*(-\d+)?", args.model):
        raise ConfigError(
            f"--model {args.model!r}: not a model of this project; give base, sft, or an aligned model, e.g. grpo-0"
        )
    algorithms = load_params(args.params).algorithms
    if args.model not in ("base", "sft") and args.model.rpartition("-")[0] not in algorithms:
        raise ConfigError(
            f"--model {args.model!r}: not a model of this project; give base, sft, or an algorithm of params.yaml with a seed, e.g."
            f" {next(iter(algorithms), 'grpo')}-0"
        )
    return str(args.model)


def inputs(args: Namespace) -> list[str]:
    """Return the files and folders that the evaluation reads."""
    folders = {str(model_folder(args.model)), str(REFERENCE)}
    params = load_params(args.params)
    reads, code = bool(params.reward_model_in_evaluation()), evaluation_code(params)
    reward = reward_inputs(args, EVALUATION, reads=reads, code=code)
    tables = ["data/valid/evaluation.parquet", "data/valid/preferences_heldout.parquet"]
    tasks = [str(TASKS)] if params.evaluation.benchmarks else []
    return [*tables, *tasks, *sorted(folders), *reward]


if __name__ == "__main__":
    main(
        run,
        "evaluate",
        params=("evaluation", "rewards"),
        inputs=inputs,
        arguments=arguments,
        variant=variant,
        several=True,
    )

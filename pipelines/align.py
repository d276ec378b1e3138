"""Align the supervised model with one algorithm and one seed, as configured under `algorithms` in params.yaml.

    python -m pipelines.align --algorithm grpo --seed 0

On-policy presets sample, score and update; preference presets learn from logged pairs. All of them start from the model that
`align.start` names, models/sft or models/base, which is also the reference policy.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pipelines.config.own_code import algorithm_code
from pipelines.config.params import load_params
from pipelines.runtime.command_line import SEED
from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from pipelines.training.reward_record import align_record, check_record, reward_inputs
from posttrain.algorithms import OnPolicy, Unpaired
from posttrain.errors import ConfigError
from posttrain.text import nearest


def run(run: Run) -> None:
    """Train with the configured algorithm and record the results."""
    from pipelines.training.setup import accelerator, device_name, peak_memory_mib, start_folder

    params, args = run.context.params, run.context.args
    name, seed = args.algorithm, args.seed
    check_record(run.context, align_record(name))
    spec = params.algorithm(name)
    device = accelerator(run.context, params.align.compute, seed, Path(start_folder(params, name)))
    if isinstance(spec, OnPolicy):
        from pipelines.training.on_policy import align
    else:
        from pipelines.training.preference import align
    run.recorder.ready(device_name(device.device))
    steps, last = align(run, name, seed, device, Path("models/align", variant(args)))
    run.recorder.timings(steps, {"memory/peak_mib": peak_memory_mib()})
    shown = {key: value for key, value in last.items() if value == value}
    run.recorder.summary(shown | {"steps": steps})
    run.recorder.tag("algorithm.preset", params.algorithms[name].preset)
    run.recorder.tag("algorithm.paper", spec.paper)


def arguments(parser: ArgumentParser) -> None:
    """Add the step's arguments."""
    parser.add_argument(
        "--algorithm", required=True, help="name of a section under `algorithms` in params.yaml, e.g. grpo"
    )
    parser.add_argument("--seed", type=SEED, required=True, help="seed of the data order and of sampling, e.g. 0")


def variant(args: Namespace) -> str:
    """Return the name of this instance of the matrix. Raises ConfigError if params.yaml has no such algorithm."""
    algorithms = load_params(args.params).algorithms
    if args.algorithm not in algorithms:
        raise ConfigError(
            f"--algorithm {args.algorithm!r}: params.yaml has no such section{nearest(args.algorithm, algorithms)}"
        )
    return f"{args.algorithm}-{args.seed}"


def read_parameters(args: Namespace) -> tuple[str, ...]:
    """Return the prefixes of the parameters that this instance reads."""
    return ("align", "rewards", "sft.train_on", f"algorithms.{args.algorithm}")


def inputs(args: Namespace) -> list[str]:
    """Return the files and folders that this instance reads: a teacher's folder is part of the run's identity."""
    params, name = load_params(args.params), args.algorithm
    teacher = params.algorithms[name].teacher if name in params.algorithms else None
    own = [teacher] if teacher and Path(teacher).is_dir() else []
    if name in params.algorithms and isinstance(params.algorithm(name), Unpaired):
        own.append("data/valid/labelled.parquet")
    if name in params.algorithms and params.start(name) == "base":
        own.append("models/base")
    reads = name in params.algorithms and bool(params.reward_model_in(name))
    code = algorithm_code(params, name) if name in params.algorithms else []
    return [*TABLES, "models/sft", *reward_inputs(args, align_record(name), reads=reads, code=code), *own]


TABLES = tuple(f"data/valid/{table}.parquet" for table in ("sft", "preferences", "problems"))

if __name__ == "__main__":
    main(
        run,
        "align",
        params=read_parameters,
        inputs=inputs,
        arguments=arguments,
        variant=variant,
        trains=True,
    )

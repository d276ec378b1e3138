"""Align the supervised model with one algorithm and one seed, as params.yaml's `algorithms` section of that name says.

    python -m pipelines.align --algorithm grpo --seed 0

On-policy presets sample, judge and update; preference presets learn from logged pairs. All start from models/sft and keep it as reference.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from posttrain.algorithms import OnPolicy

START = Path("models/sft")


def run(run: Run) -> None:
    from pipelines.training.setup import accelerator, peak_memory_mib

    params, args = run.context.params, run.context.args
    name, seed = args.algorithm, args.seed
    spec = params.algorithm(name)
    device = accelerator(params.align.compute, seed, START)
    if isinstance(spec, OnPolicy):
        from pipelines.training.on_policy import align
    else:
        from pipelines.training.preference import align
    run.recorder.ready()
    steps, last = align(run, name, seed, device, Path("models/align", variant(args)))
    run.recorder.timings(steps, {"memory/peak_mib": peak_memory_mib()})
    shown = {key: value for key, value in last.items() if value == value}
    run.recorder.summary(shown | {"steps": steps})
    run.recorder.tag("algorithm.preset", params.algorithms[name].preset)
    run.recorder.tag("algorithm.paper", spec.paper)


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--algorithm", required=True, help="a section of params.yaml under `algorithms`, e.g. grpo")
    parser.add_argument("--seed", type=int, required=True, help="seed of the order of data and of sampling, e.g. 0")


def variant(args: Namespace) -> str:
    return f"{args.algorithm}-{args.seed}"


def read_parameters(args: Namespace) -> tuple[str, ...]:
    return ("align", "rewards", f"algorithms.{args.algorithm}")


TABLES = tuple(f"data/valid/{table}.parquet" for table in ("sft", "preferences", "problems"))

if __name__ == "__main__":
    main(
        run,
        "align",
        params=read_parameters,
        inputs=(*TABLES, "models/sft", "models/reward"),
        arguments=arguments,
        variant=variant,
        trains=True,
    )

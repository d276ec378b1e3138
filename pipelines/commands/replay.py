"""Compute the updates of an on-policy run again from its kept rollouts, and name the first number that differs.

    posttrain replay grpo-0              # every step
    posttrain replay grpo-0 --step 37    # up to step 37
    posttrain replay .posttrain/runs/align-grpo-0-0123456789abcdef --step 3

Nothing is sampled: each update reads its tokens, masks, log-probabilities, rewards and advantages from the tables of a run with
`align.on_policy.rollouts.keep: all`, and starts from the model that the run started from, with the run's own parameters. On a CPU, the
metrics are equal to the last bit. A change of code or library that changes an update is found at the first step that it changes.
Exit status 1: a number differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from tqdm import tqdm

from pipelines.config.params import Params, load_params
from pipelines.config.schema import AlgorithmParams, AlignParams, OnPolicyBudget
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, print_text, reports_errors, whole
from pipelines.runtime.context import RunContext
from pipelines.runtime.identity import content_digest
from pipelines.runtime.journal import Record, number, read
from pipelines.runtime.publish import ARTIFACTS, JOURNAL
from posttrain.algorithms import OnPolicy
from posttrain.errors import ConfigError, DataError
from posttrain.text import nearest, reason_of

if TYPE_CHECKING:
    from posttrain.training.onpolicy import OnPolicyObjective
    from posttrain.training.trainer import Trainer

RUNS = Path("runs/align")
KEEP = "posttrain configure align.on_policy.rollouts.keep=all"


class RecordedRun:
    """The journal of an align run: its start, parameters, and the metrics of each step.

    Raises:
        DataError: the folder holds no journal of an align run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        records = read(folder / JOURNAL)
        self.start = _only(records, "start", folder)
        self.values: dict[str, Any] = _only(records, "params", folder)["values"]
        if self.start["stage"] != "align":
            raise DataError(
                f"{folder}: a run of the stage {self.start['stage']}; only alignment on the policy's own answers can be replayed"
            )
        self.algorithm, self.seed = str(self.start["arguments"]["algorithm"]), int(self.start["arguments"]["seed"])
        self.metrics = {
            int(record["step"]): {name: number(value) for name, value in record["values"].items()}
            for record in records
            if record["kind"] == "metrics"
        }

    def params(self, present: Params) -> Params:
        """Return the present parameters with the run's own values of `align` and its algorithm.

        Raises:
            DataError: a different version of this software wrote them.
        """
        tree: dict[str, Any] = {}
        for name, value in self.values.items():
            node, *parts = tree, *name.split(".")
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = value
        try:
            align = AlignParams.model_validate(tree["align"])
            section = AlgorithmParams.model_validate(tree["algorithms"][self.algorithm])
        except (ValidationError, KeyError) as error:
            raise DataError(
                f"{self.folder}: its parameters are of a different version of this software ({reason_of(error)}); check out the commit"
                " of the run"
            ) from error
        return present.model_copy(update={"align": align, "algorithms": {self.algorithm: section}})

    def require_input(self, path: str) -> None:
        """Raise DataError if an input is not the one that the run read."""
        recorded = self.start["inputs"].get(path)
        if not Path(path).is_dir() or (recorded is not None and content_digest(Path(path)) != recorded):
            raise DataError(
                f"{path}: not the model that {self.folder} started from, so its updates cannot be computed again. Restore it with"
                f" `dvc checkout {path}`, in the commit of the run if a newer run has replaced it."
            )


def find_run(name: str) -> Path:
    """Return the folder of a run by its name, such as grpo-0, or by its path. Raises DataError if there is none."""
    for folder in (Path(name), RUNS / name):
        if (folder / JOURNAL).is_file():
            return folder
    known = sorted(path.parent.name for path in RUNS.glob(f"*/{JOURNAL}"))
    raise DataError(f"no run {name!r}{nearest(name, known)}. A run is named as in {RUNS}, e.g. grpo-0.")


def replay(run: RecordedRun, params: Params, last: int) -> str:
    """Compute the steps up to `last` again. Return the first difference in words, or an empty text."""
    from pipelines.training.rollout_tables import file_name, read_table
    from posttrain.training.replay import differences, replay_step

    trainer, objective = _learner(run, params)
    with tqdm(total=last, desc=f"replay {run.folder.name}", unit="step", mininterval=1.0) as bar:
        for step in range(1, last + 1):
            recorded = run.metrics[step]
            path = run.folder / ARTIFACTS / file_name(step)
            if path.is_file() or "loss" in recorded:
                kept = read_table(path)
                if kept.rows and not kept.updates:
                    raise DataError(f"{path}: holds only some of the step's answers; a replay needs all: {KEEP}")
                found = differences(recorded, replay_step(trainer, objective, kept, "faults/skipped" in recorded))
                if found:
                    several = f" ({len(found)} metrics differ: {', '.join(each.name for each in found)})"
                    chosen = next((each for each in found if each.name == "loss"), found[0])
                    return (
                        f"first difference: step {step}, {chosen.name}: {chosen.recorded!r} in the run,"
                        f" {chosen.replayed!r} in the replay{several}"
                    )
            bar.update()
    return ""


def _learner(run: RecordedRun, params: Params) -> tuple[Trainer[Any], OnPolicyObjective]:
    """Return trainer and loss as the run had them before its first step."""
    from pipelines.training.on_policy import REWARD, make_objective, make_policy, make_trainer
    from pipelines.training.setup import accelerator, start_folder

    name = run.algorithm
    spec, budget, start = params.algorithm(name), params.budget(name), start_folder(params, name)
    if not isinstance(spec, OnPolicy) or not isinstance(budget, OnPolicyBudget):
        raise ConfigError(
            f"{run.folder}: {params.algorithms[name].preset} learns from logged pairs and samples no rollouts; a replay needs an on-policy"
            " algorithm such as grpo"
        )
    if budget.rollouts.keep != "all":
        raise ConfigError(
            f"{run.folder}: was trained with rollouts.keep: {budget.rollouts.keep}; a replay needs all answers. Type `{KEEP}`, then train"
            " again."
        )
    run.require_input(start)
    if spec.has_critic and spec.critic != "shared" and spec.critic_start == "reward":
        run.require_input(REWARD.as_posix())
    with TemporaryDirectory(prefix="posttrain-") as scratch:
        context = RunContext(
            stage="align", name=run.folder.name, params=params, args=argparse.Namespace(), key=run.start["key"],
            state=Path(scratch), directory=Path(scratch), code="",
        )  # fmt: skip
        device = accelerator(context, params.align.compute, run.seed, Path(start))
    policy = make_policy(spec, params.align, start).model.to(device.device)
    trainer = make_trainer(spec, budget, policy, params.align.compute.micro_batch_tokens, device)
    return trainer, make_objective(spec, budget)


def _only(records: list[Record], kind: str, folder: Path) -> Record:
    """Return the record of a kind that every journal has once."""
    found = next((record for record in records if record["kind"] == kind), None)
    if found is None:
        raise DataError(f"{folder / JOURNAL}: has no {kind} record, so it is not the journal of a run")
    return found


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain replay", __doc__)
    parser.add_argument("run", metavar="RUN", help="name of a run, e.g. grpo-0, or its folder")
    parser.add_argument("--step", type=whole(1), help="last step to compute again, counted from 1; default: all")
    args = parser.parse_args(argv)
    environment.quiet()
    os.chdir(environment.root())
    run = RecordedRun(find_run(args.run))
    params = run.params(load_params("params.yaml"))
    last = max(run.metrics, default=0)
    if args.step is not None and not 1 <= args.step <= last:
        raise ConfigError(f"--step {args.step}: {run.folder} has the steps 1 to {last}")
    last = args.step or last
    found = replay(run, params, last)
    if found:
        print_text(found)
        return 1
    shown = "".join(
        f", {name} {run.metrics[last][name]!r}" for name in ("loss", "grad_norm") if name in run.metrics[last]
    )
    print_text(f"{run.folder}: steps 1 to {last} give the same numbers to the last bit. Step {last}{shown}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

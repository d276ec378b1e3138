"""Entry point of every step: arguments, identity, resuming, errors, signals and exit status.

A step is a module with `def run(run: Run) -> None` and, at its end,

    if __name__ == "__main__":
        main(run, "sft", params=("sft", "model"), inputs=("data/valid/sft.parquet", "models/base"))

This module imports neither torch nor mlflow, so a step that needs no model starts at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from pipelines.config.params import Params, load_params
from pipelines.runtime import environment, launch, meeting
from pipelines.runtime.consistency import InputSnapshot
from pipelines.runtime.context import CHECKPOINTS, LOCK, RunContext
from pipelines.runtime.follower import Follower
from pipelines.runtime.fork_server import run_in_fork_server
from pipelines.runtime.garbage import collect_as_usual
from pipelines.runtime.identity import SOURCES, code_digest, input_digests, require_inputs, run_key
from pipelines.runtime.journal import FAILED, FINISHED, KILLED
from pipelines.runtime.param_tracking import Reads, declared_values, watched
from pipelines.runtime.process import GRACE_SECONDS, STAGE, Lock, StopSignals, up_to_dvc
from pipelines.runtime.publish import ARTIFACTS, publish
from pipelines.runtime.redaction import printable, redact
from pipelines.runtime.run import Run
from posttrain.errors import ConfigError, Interrupted, PosttrainError, TrackingError, memory_fault
from posttrain.guard import end_with
from posttrain.text import reason_of

Body = Callable[[Run], None]
"""The function that does a step's work."""
Names = Sequence[str] | Callable[[argparse.Namespace], Sequence[str]]
"""Names of parameters or inputs, or a function that computes them from the parsed arguments."""
TRACEBACK = "traceback.txt"


@dataclass
class Step:
    """Everything that a step module passes to `main`."""

    body: Body
    stage: str
    params: Names = ()
    inputs: Names = ()
    arguments: Callable[[argparse.ArgumentParser], object] | None = None
    variant: Callable[[argparse.Namespace], str] | None = None
    doc: str | None = None
    trains: bool = False
    signals: StopSignals = field(default_factory=StopSignals)


def main(
    body: Body,
    stage: str,
    *,
    params: Names = (),
    inputs: Names = (),
    arguments: Callable[[argparse.ArgumentParser], object] | None = None,
    variant: Callable[[argparse.Namespace], str] | None = None,
    doc: str | None = None,
    trains: bool = False,
    several: bool = False,
) -> None:
    """Run a step and exit with its status: 0, the error's exit_code after one paragraph, or 1 after a traceback.

    Args:
        body: Does the step's work.
        stage: Name of the step's stage in dvc.yaml.
        params: Dotted prefixes of the parameters that the step may read, or a function of the parsed arguments.
        inputs: Files and folders that the step depends on, or a function of the parsed arguments.
        arguments: Adds the step's own arguments to the parser.
        variant: Names an instance of a matrix, e.g. "grpo-0".
        doc: Help text; by default the module's docstring.
        trains: True if the step trains a model. It can then replay an update that met a numerical fault (--replay).
        several: True if POSTTRAIN_ACCELERATE may run the step as several processes, as every step that trains.
    """
    environment.quiet()
    if launch.launched():
        end_with([os.getppid()], GRACE_SECONDS)
    elif STAGE in os.environ:
        end_with(up_to_dvc(), GRACE_SECONDS)
    step = Step(body, stage, params, inputs, arguments, variant, doc or sys.modules[body.__module__].__doc__, trains)
    if trains or several:
        _become_launcher(step)
    _run_in_fork_server()
    step.signals.install()
    args = _parse(step)
    try:
        environment.require_own_code(environment.root())
        environment.require_threads()
        collect_as_usual()
        _prepare_and_execute(step, args)
    except PosttrainError as error:
        print(f"{_speaker()}error: {printable(redact(str(error)))}", file=sys.stderr)
        meeting.report(printable(redact(str(error))))
        sys.exit(error.exit_code)
    except BaseException as error:
        meeting.report(printable(redact(reason_of(error))))
        if not isinstance(error, Exception) and not environment.is_panic(error):
            raise
        _stop(step, error)
    finally:
        _leave_group()


def _stop(step: Step, error: BaseException) -> NoReturn:
    """Report a fault of the machine in words and exit with status 2; any other error is a bug, with its traceback."""
    memory = memory_fault(error)
    fault = environment.machine_fault(error) if isinstance(error, OSError | RuntimeError) else None
    fault = fault or environment.panic_fault(error)
    if memory is not None:
        words = (
            f"{step.stage} ran out of memory ({memory}). Lower compute.micro_batch_tokens of this stage, or set"
            " compute.gradient_checkpointing: true; the result stays the same up to rounding. `posttrain plan` estimates what each stage"
            " needs."
        )
    elif fault is not None:
        words = (
            f"{step.stage} cannot continue: {fault}, then run the same command: it continues from its last checkpoint."
        )
    else:
        _fail_with_traceback()
    print(f"error: {words}", file=sys.stderr)
    sys.exit(PosttrainError.exit_code)


def _speaker() -> str:
    """Return a prefix with the rank for error lines, empty for rank 0."""
    return f"process {launch.process()}: " if launch.process() else ""


def _leave_group() -> None:
    """Destroy the process group in order; otherwise its threads would abort at interpreter exit."""
    if launch.launched() and "torch" in sys.modules:
        from posttrain.distributed import destroy_group

        destroy_group()


def _become_launcher(step: Step) -> None:
    """Become the launcher of several processes if POSTTRAIN_ACCELERATE asks for it.

    Missing inputs and settings that the processes cannot combine are refused before, once.
    """
    single_process = {"-h", "--help", "--replay"} & set(sys.argv[1:])
    if launch.launched() or not launch.asked() or single_process:
        return
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "a step is run as a module"
    try:
        path = launch.configuration()
        _check_before_launch(step, path)
        if path is None:
            return
        sys.exit(launch.launch(path, spec.name, sys.argv[1:]))
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _check_before_launch(step: Step, path: Path | None) -> None:
    """Raise ConfigError if the stage's settings cannot be combined over the processes, and DataError if an input is missing."""
    from pipelines.runtime.combinations import stage_refusals

    args = _parse(step)
    root = environment.root()
    params = load_params(args.params.resolve() if args.params else root / "params.yaml")
    if found := stage_refusals(root, params, step.stage, getattr(args, "algorithm", None), path):
        raise ConfigError("\n".join(found))
    require_inputs(_name(step, args), step.inputs(args) if callable(step.inputs) else step.inputs, root)


def _name(step: Step, args: argparse.Namespace) -> str:
    """Return the name of the run: its stage, with its variant."""
    variant = step.variant(args) if step.variant else None
    return f"{step.stage}-{variant}" if variant else step.stage


def _fail_with_traceback() -> NoReturn:
    """Print the traceback without secrets and exit with status 1."""
    print(redact(traceback.format_exc()), end="", file=sys.stderr)
    sys.exit(1)


def _run_in_fork_server() -> None:
    """Run the step in the flow's fork server, if there is one."""
    if launch.launched():
        return
    spec = sys.modules["__main__"].__spec__
    status = run_in_fork_server(spec.name, sys.argv[1:]) if spec else None
    if status is not None:
        sys.exit(status)


def _parse(step: Step) -> argparse.Namespace:
    """Parse the command line of a step."""
    module = f"python -m pipelines.{step.stage}"
    program = f"posttrain {step.stage}" if environment.started_by_console() else module
    parser = argparse.ArgumentParser(
        prog=program,
        description=(step.doc or "").replace(module, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--params", type=Path, default=None, help="parameter file to use instead of the project's params.yaml"
    )
    if step.trains:
        parser.add_argument(
            "--replay",
            type=lambda text: Path(text).resolve(),
            metavar="FOLDER",
            help="replay the update saved in FOLDER, report the rows that cause the fault, and do not train",
        )
    if step.arguments:
        step.arguments(parser)
    return parser.parse_args()


def _prepare_and_execute(step: Step, args: argparse.Namespace) -> None:
    """Compute the run's identity, take its lock, and run the step's body."""
    project = environment.root()
    path = args.params.resolve() if args.params else project / "params.yaml"
    os.chdir(project)
    args.params = path
    variant, name = step.variant(args) if step.variant else None, _name(step, args)
    params = load_params(path)
    declared = tuple(step.params(args) if callable(step.params) else step.params)
    entries = step.inputs(args) if callable(step.inputs) else step.inputs
    snapshot = InputSnapshot.take(step.stage, path, declared, entries)
    inputs = input_digests(name, entries)
    values = declared_values(params, declared)
    key = run_key(name, values, inputs)
    state = environment.states(project) / f"{name}-{key[:16]}"
    if getattr(args, "replay", None) is not None:
        _replay(step, args, params, name, key, inputs)
    main_process = launch.process() == 0
    lock = Lock(state / LOCK)
    if main_process and not lock.acquire():
        raise TrackingError(
            f"{name} is already running with these parameters and inputs ({state}). Two runs would write the same files:"
            " wait for it or stop it."
        )
    reads = Reads(step.stage, declared)
    context = RunContext(
        stage=step.stage, name=name, params=watched(params, reads), args=args, key=key, state=state,
        code=code_digest(project, step.stage), inputs=inputs,
        directory=Path("runs", step.stage, variant or ""), stop_requested=step.signals.requested, records=main_process,
    )  # fmt: skip
    run = Run.create(context)
    if not main_process:
        step.body(run)
        return
    arguments = {key: value for key, value in sorted(vars(args).items()) if key not in ("params", "replay")}
    start = {"kind": "start", "stage": step.stage, "name": name, "key": key, "run": state.name, "arguments": arguments,
             "directory": context.directory.as_posix(), "inputs": inputs}  # fmt: skip
    recorder = run.recorder
    recorder.open(start, {"kind": "params", "values": values}, _surroundings(params))
    if recorder.resumed:
        held = _held(recorder.last_step())
        print(f"{name}: continuing run {context.identity}, journal holds {held}", file=sys.stderr, flush=True)
    follower = Follower.start(context.identity)
    try:
        _execute(step, run, lambda: snapshot.verify(inputs))
        _trace(context, reads)
    finally:
        lock.release()
        follower.finish()
    snapshot.verify(inputs)  # again, because the follower may have waited for a server
    snapshot.write()


def _replay(
    step: Step, args: argparse.Namespace, params: Params, name: str, key: str, inputs: dict[str, str]
) -> NoReturn:
    """Run the body up to its training, which replays the saved update and exits. Nothing is recorded."""
    with TemporaryDirectory(prefix="posttrain-") as folder:
        scratch = Path(folder)
        context = RunContext(
            stage=step.stage,
            name=name,
            params=params,
            args=args,
            key=key,
            code="",
            inputs=inputs,
            state=scratch,
            directory=scratch,
        )
        step.body(Run.create(context))
    raise AssertionError(f"{step.stage} is declared as a training step, but did not train")


def _held(last: int | None) -> str:
    """Return the range of steps in the journal, in words."""
    return "no steps" if last is None else f"steps up to {last}"


def _surroundings(params: Params) -> dict[str, Any]:
    """Return facts about the place of a run that MLflow shows; they are not part of its result."""
    return {
        "kind": "start",
        "experiment": params.project.experiment,
        "commit": environment.commit(),
        "dvc_stage": os.environ.get(STAGE),
        "flow_run": os.environ.get("POSTTRAIN_FLOW_RUN"),
    }


def _has_more_lines(error: BaseException) -> bool:
    """Return True if a foreign error of several lines, of which our message shows the first and the last, caused this one."""
    texts = [*getattr(error, "__notes__", []), str(error.__cause__ or "").strip()]
    return any("\n" in text for text in texts)


def _execute(step: Step, run: Run, verify: Callable[[], None]) -> None:
    """Run the body, verify that its inputs are as they were, and write the end of the journal, whatever happens."""
    state, recorder = run.context.state, run.recorder
    try:
        step.body(run)
        verify()
        publish(state, run.context.directory, end={"kind": "end", "status": FINISHED})
    except (Interrupted, KeyboardInterrupt) as error:
        step.signals.ignore()
        recorder.close(KILLED, str(error))
        raise
    except BaseException as error:
        step.signals.ignore()
        # a user's code may raise a text with half of a surrogate pair
        text = redact(traceback.format_exc()).encode(errors="backslashreplace").decode()
        try:
            (state / ARTIFACTS).mkdir(exist_ok=True)
            (state / ARTIFACTS / TRACEBACK).write_text(text, encoding="utf-8")
            if isinstance(error, PosttrainError) and _has_more_lines(error):
                print(f"The full text of this error: {state / ARTIFACTS / TRACEBACK}", file=sys.stderr)
            recorder.close(FAILED, f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode())
        except OSError as full:
            # A journal without an end record marks a run that was cut off: the same command continues it.
            error.add_note(f"the end could not be written to the journal either: {full}")
        raise
    step.signals.ignore()
    recorder.close(FINISHED)
    shutil.rmtree(state / CHECKPOINTS, ignore_errors=True)
    (state / ARTIFACTS / TRACEBACK).unlink(missing_ok=True)


def _trace(context: RunContext, reads: Reads) -> None:
    """Append the modules and parameters that were used to POSTTRAIN_TRACE, for the test of dvc.yaml's dependencies."""
    target = os.environ.get("POSTTRAIN_TRACE")
    if not target:
        return
    origins = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    files = {Path(origin).resolve() for origin in origins if origin}
    modules = (f.relative_to(SOURCES) for f in files if f.is_relative_to(SOURCES))
    used = sorted(m.as_posix() for m in modules if m.parts[0] in ("posttrain", "pipelines"))
    line = {"stage": context.stage, "name": context.name, "params": sorted(reads.leaves), "modules": used}
    with Path(target).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


__all__ = ["Run", "main"]

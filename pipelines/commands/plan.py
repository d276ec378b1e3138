"""Estimate a run with the current parameters before it starts: optimiser steps, tokens, and memory by phase.

    posttrain plan
    posttrain plan --memory 80        # for a device with 80 GiB
    posttrain plan --device cuda --memory 80     # for a GPU that this machine does not have
    posttrain plan --params other.yaml
    posttrain plan --workers 8        # how long with up to 8 stages side by side

Memory is computed from the model's configuration: of a folder only config.json is read. It is the memory of one process. If
POSTTRAIN_ACCELERATE names an FSDP2 configuration, its processes share weights, gradients and moments; each also gathers embeddings,
head and two layers. With `engine: vllm` on a GPU a line gives the share of a server next to the trainer.
Tokens are the most that the limits of `validation` let through. Rows are those of the validated tables if `data` has not changed since,
else those of the local files, or the number that `data` asks for. Times are those of this machine's last steps.
The last lines say which difference of two algorithms the present seeds and prompts can show, from finished runs.
Exit status 1: something will not fit, or a warm-up is longer than its run. Settings that the processes in the environment cannot combine
are refused with status 2.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.calibrate import power
from pipelines.commands.forecast import rows_by_table, seconds_by_stage, steps_by_stage, time_line, too_long_warmups
from pipelines.commands.lookahead import missing_packages, problems
from pipelines.commands.notes import notes
from pipelines.commands.server_share import server_lines
from pipelines.config.params import Params, load_params
from pipelines.config.schema import OnPolicyBudget
from pipelines.report.makespan import Work, critical_path, expected_work, schedule, worker_counts
from pipelines.runtime import environment
from pipelines.runtime.combinations import all_refusals
from pipelines.runtime.command_line import command_parser, real, reports_errors
from pipelines.runtime.launch import all_processes, configuration, sharing_processes
from pipelines.tracking.lockfile import read_lock
from pipelines.training.planned_memory import models_held, published_bytes, saving, snapshots, training_options
from posttrain.algorithms import OnPolicy
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.planning import Memory, Sizes

GIB, MIB = 2**30, 2**20
COLUMNS = ("weights", "optimiser", "activations", "cache", "logits", "temporary", "runtime", "total")


SMALLER = ("use a smaller model", "")
SHARD = ("shard it over devices", "processes")
ADVICE = {
    "weights": (SMALLER, SHARD, ("set lora with base_bits: 4", "quantised")),
    "optimiser": (SMALLER, SHARD, ("set lora", "adapter"), ("set optimizer.moment_bits: 8", "moment_bits"),
                  ("set optimizer.offload: true", "offloaded")),
    "activations": (("lower compute.micro_batch_tokens", ""), ("set compute.gradient_checkpointing", "recomputes")),
    "logits": (("lower compute.micro_batch_tokens", ""),),
    "cache": (("lower prompts_per_step, samples_per_prompt or max_new_tokens", ""),),
    "temporary": (SMALLER, ("set lora", "adapter")),
}  # fmt: skip
"""What to do about the largest part of the memory, and the option that says that it is done already."""


@dataclass(frozen=True)
class Phase:
    """One part of a stage. `steps` is 0 if nothing is trained; `tokens` is None if the number of rows is not known yet.

    Attributes:
        used: options of its training that save memory.
    """

    stage: str
    name: str
    steps: int | None
    tokens: int | None
    memory: Memory
    used: frozenset[str] = frozenset()


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain plan", __doc__)
    parser.add_argument("--params", type=Path, help="parameter file to use instead of the project's params.yaml")
    parser.add_argument(
        "--memory", type=real(0.001, 1e6), metavar="GIB", help="memory of one device in GiB (default: this machine's)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="kind of the device (default: this machine's)")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="show the time with up to N stages side by side, from the last flow's times",
    )
    args = parser.parse_args(arguments)
    if args.workers is not None and args.workers < 1:
        parser.error("--workers must be 1 or more")
    device = args.device or _device()
    if device == "cuda" != _device() and args.memory is None:
        parser.error("--device cuda needs --memory GIB, because this machine has no GPU whose memory could be read")
    path = args.params.resolve() if args.params else environment.root() / "params.yaml"
    os.chdir(environment.root())
    params = load_params(path)
    sys.path.insert(0, os.getcwd())
    found = [*problems(params, packages=False), *all_refusals(environment.root(), params, configuration())]
    if found:
        raise ConfigError("\n".join(found))
    model = model_sizes(params)
    limit = int(args.memory * GIB) if args.memory else device_bytes()
    planned = [with_runtime(phase, device) for phase in phases(params, model, limit, device)]
    shown = power(params)
    print(page(params, model, planned, limit, device))
    counted = rows_by_table(params)
    steps = steps_by_stage(params, counted)
    print(f"\n{rows_line(counted)}\n{time_line(params, steps, seconds_by_stage(Path()))}")
    stopping = too_long_warmups(params, steps)
    servers = list(server_lines(params, _config(params), device, limit))
    lines = [*stopping, *(server.text for server in servers), *missing_packages(params), *notes(params), shown]
    print("\n".join(["", *lines]))
    if args.workers:
        print("\n" + workers_table(expected_work(Path(), read_lock(Path()), params), args.workers))
    fits = all(server.fits for server in servers) and all(phase.memory.total <= limit for phase in planned)
    return int(bool(stopping) or not fits)


def workers_table(work: Mapping[str, Work], most: int) -> str:
    """Return the time of a flow with 1, 2, 4 … workers as a table, and the stages that bound it."""
    path = critical_path(work)
    rows = [schedule(work, count) for count in worker_counts(most)]
    longest = _decimal_minutes(sum(work[name].seconds for name in path))
    return "\n".join(
        [
            f"{len(work)} stages with the times of the last flow here; POSTTRAIN_SLOTS sets how many run side by side:",
            "  workers   time      busy",
            *(f"  {row.workers:>7}   {_decimal_minutes(row.wall):<9} {row.busy:.0%}" for row in rows),
            f"No number of workers takes less than {longest}: {' -> '.join(path)}",
        ]
    )


def _decimal_minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def model_sizes(params: Params) -> Sizes:
    """Return the sizes of the configured model."""
    from posttrain.planning import sizes

    return sizes(_config(params))


def _config(params: Params) -> Any:
    """Return the model's configuration: the tiny model's shape, or the configuration of a folder or hub id."""
    from posttrain.models.folders import load_config
    from posttrain.models.gguf import is_gguf, load_gguf_config
    from posttrain.models.tiny import TinyShape, tiny_config

    source = params.model.source
    if is_gguf(source):
        return load_gguf_config(Path(source))
    return (
        tiny_config(TinyShape(**params.model.tiny.model_dump()))
        if source == "tiny"
        else load_config(source, weights=False)
    )


def _device() -> str:
    """Return the kind of the device that stages use."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def phases(params: Params, model: Sizes, limit: int | None = None, device: str | None = None) -> Iterator[Phase]:
    """Yield every phase that holds a model, in the order of the DAG; all seeds of an algorithm have the same plan.

    Args:
        limit: bytes of a device, of whose free part a GPU's sampler uses a share.
        device: kind of the device; None: this machine's.
    """
    from posttrain.planning import training

    device = device or _device()
    options = partial(training_options, _config(params), device=device)
    longest = params.validation.max_prompt_tokens + params.validation.max_completion_tokens
    sft, reward = params.sft, params.reward
    counted = rows_by_table(params)
    steps = steps_by_stage(params, counted)
    # with `each`, a row has as many sequences as answers, which are not counted before a run
    rows = None if sft.train_on == "each" else counted["sft"]
    given = options(sft.compute, sft.lora, sft.optimizer)
    memory = training(model, sft.compute.micro_batch_tokens, **given)
    yield Phase("sft", "train", steps["sft"], _times(rows, sft.epochs * longest), memory, saving(given))
    pairs = counted["preferences"]
    if reward.enabled and reward.source is None:
        given = options(reward.compute, reward.lora, reward.optimizer)
        memory = training(model.with_scalar_head(), reward.compute.micro_batch_tokens, **given)
        yield Phase(
            "reward", "train", steps["reward"], _times(pairs, 2 * reward.epochs * longest), memory, saving(given)
        )
    for name in params.project.algorithms:
        yield from _alignment(params, name, model, steps[f"align@{name}"], pairs, longest, limit, options)
    yield from _evaluation(params, model, counted["evaluation"], limit, device)


def _alignment(
    params: Params,
    name: str,
    model: Sizes,
    steps: int | None,
    pairs: int | None,
    longest: int,
    limit: int | None,
    options: Callable[..., dict[str, Any]],
) -> Iterator[Phase]:
    """Yield the phases of one algorithm."""
    from posttrain.planning import sampling, training

    spec, budget, compute = params.algorithm(name), params.budget(name), params.align.compute
    stage, given = f"align@{name}", options(compute, params.align.lora, budget.optimizer)
    if not isinstance(spec, OnPolicy):
        memory = training(model, compute.micro_batch_tokens, **given)
        yield Phase(stage, "train", steps, _times(pairs, 2 * spec.epochs * longest), memory, saving(given))
        return
    assert isinstance(budget, OnPolicyBudget)
    answers = budget.prompts_per_step * budget.samples_per_prompt
    prompt, samples = params.validation.max_prompt_tokens, budget.samples_per_prompt
    length = prompt + budget.max_new_tokens
    shared = ("adapter", "quantised", "moment_bits", "offloaded", "bf16", "device", "processes")
    held: dict[str, Any] = models_held(params, name) | {key: given[key] for key in shared}
    native, staleness = budget.rollouts.engine == "native", budget.rollouts.staleness
    if native and staleness:
        # the process that samples ahead holds a model, and main memory the snapshots for it
        own = 0 if os.environ.get("POSTTRAIN_SAMPLER_DEVICES") else 1
        held["frozen"] += 1 + snapshots(budget.rollouts) if given["device"] == "cpu" else own
    # A vLLM server has its cache on its own device; `sampling` divides the answers of processes that share weights.
    mine = answers if given["processes"] > 1 else _share(budget.prompts_per_step) * samples
    here = mine if native else 0
    held["bf16"] = native and compute.bf16
    copies = published_bytes(params, name, model, given)
    sampled = sampling(model, here, prompt, budget.max_new_tokens, samples=samples, device_bytes=limit, **held)
    rounds = spec.refill_limit if spec.filter == "refill" else 1
    tokens = budget.steps * rounds * answers * budget.max_new_tokens
    sampled = replace(sampled, weights=sampled.weights + copies)
    yield Phase(stage, "sample", 0, tokens, sampled, saving(given))
    memory = training(model, compute.micro_batch_tokens, **held | given)
    memory = replace(memory, weights=memory.weights + copies)
    yield Phase(stage, "train", steps, budget.steps * spec.epochs * answers * length, memory, saving(given))


def _evaluation(params: Params, model: Sizes, count: int | None, limit: int | None, device: str) -> Iterator[Phase]:
    """Yield the phase of the evaluation."""
    from posttrain.planning import sampling
    from posttrain.rollouts.engine import MAX_ROWS

    evaluation = params.evaluation
    answers, new_tokens = _times(count, 1 + evaluation.samples_per_prompt), evaluation.max_new_tokens
    samples = max(1, evaluation.samples_per_prompt)  # the greedy answers are sampled before
    at_once = MAX_ROWS if count is None else _share(count) * samples
    bf16, prompt = evaluation.compute.bf16, params.validation.max_prompt_tokens
    scored = int(any(params.rewards[source].function == "reward_model" for source in evaluation.rewards))
    memory = sampling(
        model,
        at_once,
        prompt,
        new_tokens,
        samples=samples,
        frozen=2 + scored,
        bf16=bf16,
        device=device,
        device_bytes=limit,
    )
    # it has whole models: neither adapters nor other processes help
    used = frozenset(("processes", "quantised", "adapter"))
    yield Phase("evaluate", "sample", 0, _times(answers, new_tokens), memory, used)


def _share(prompts: int) -> int:
    """Return the most prompts of one process."""
    return math.ceil(prompts / all_processes(configuration()))


def _times(count: int | None, factor: int) -> int | None:
    """Return the product, or None if the count is unknown."""
    return None if count is None else count * factor


def with_runtime(phase: Phase, device: str) -> Phase:
    """Return the phase with the memory of the libraries, which share a machine's memory with the model if there is no GPU."""
    from posttrain.planning import RUNTIME_BYTES

    runtime = RUNTIME_BYTES if device == "cpu" else 0
    return replace(phase, memory=replace(phase.memory, runtime=runtime))


def device_bytes() -> int:
    """Return the memory of the first GPU, or this machine's memory if there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def page(params: Params, model: Sizes, planned: Sequence[Phase], limit: int, device: str = "cpu") -> str:
    """Return the plan as text."""
    seeds, shared = len(params.project.seeds), sharing_processes(configuration())
    lines = [
        f"model: {model.parameters:,} parameters ({params.model.source}); {seeds} seed{'s' * (seeds > 1)} per algorithm;"
        f" a {'GPU' if device == 'cuda' else 'device'} has {limit / GIB:.1f} GiB"
        f"{f'; {shared} processes share weights, gradients and moments' if shared > 1 else ''}\n",
        _cells(["stage", "phase", "optimiser steps", "max. tokens", *COLUMNS]),
    ]
    lines += [
        _cells([p.stage, p.name, _count(p.steps), _count(p.tokens), *(_bytes(getattr(p.memory, c)) for c in COLUMNS)])
        for p in planned
    ]
    lines += [_too_large(phase, limit) for phase in planned if phase.memory.total > limit]
    return "\n".join(lines)


def rows_line(counted: Mapping[str, int | None]) -> str:
    """Return the rows of each table in words."""
    return "rows: " + ", ".join(f"{table} {_count(count)}" for table, count in counted.items())


def _too_large(phase: Phase, limit: int) -> str:
    """Return a message with the largest part of a phase that does not fit, and advice that its settings do not follow yet."""
    largest = max(ADVICE, key=lambda column: int(getattr(phase.memory, column)))
    *most, last = [words for words, setting in ADVICE[largest] if setting not in phase.used]
    advice = f"{', '.join(most)}, or {last}" if most else last
    return (
        f"\n{phase.stage} ({phase.name}) does not fit: it needs {_bytes(phase.memory.total)} of {_bytes(limit)}, most of it for {largest};"
        f" {advice}."
    )


def _cells(cells: Sequence[str]) -> str:
    """Return one aligned row."""
    widths = (22, 8, 16, 13, *[12] * len(COLUMNS))
    return "".join(
        cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )


def _count(value: int | None) -> str:
    """Return a count as text."""
    return "unknown" if value is None else f"{value:,}"


def _bytes(value: Any) -> str:
    """Return a number of bytes in GiB or MiB."""
    return f"{value / GIB:,.1f} GiB" if value >= GIB else f"{value / MIB:,.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())

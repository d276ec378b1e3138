"""Compare training steps with TRL: the same model, rows, batches and numerics, in alternating runs with one thread each.

    python benchmarks/training.py [--repeats 5] [--cases sft,grpo-long] [--quick] [--write]

TRL runs in its own environment, which `benchmarks/peers/setup.sh trl` creates. First, each case is shown to be the same work: loss and
gradient norm of the first step must agree on the same tokens. A run is the whole loop of a new trainer, without loading the model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.models.folders import save_model
from posttrain.models.scorers import load_new_scorer
from posttrain.models.tiny import TinyShape, byte_tokenizer, tiny_model

HERE = Path(__file__).parent
SIDES = ("posttrain", "TRL")
TABLE, PICTURE = HERE / "training.md", HERE / "training.png"
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
SMALL = TinyShape(max_length=1024)
STORIES = HERE.resolve().parents[1] / "shared" / "data" / "stories260k"
SMOLLM2 = HERE.resolve().parent / ".posttrain" / "models" / "smollm2"
"""SmolLM2-135M-Instruct, made by infra/models/smollm2.sh; without it these cases are left out."""
MIDDLE = TinyShape(hidden_size=512, intermediate_size=1536, layers=9, heads=8, kv_heads=4, max_length=1024)


@dataclass(frozen=True)
class Case:
    """One row of the table. prompt, answer: lengths in tokens, (minimum, maximum), or log-normal if `log_normal`.

    batch: rows or prompts per step. micro_rows: TRL's fastest number of rows per forward pass. bar: target of the ratio.
    """

    name: str
    kind: str
    batch: int
    steps: int
    prompt: int
    answer: tuple[int, int]
    micro_rows: int
    bar: float
    shape: TinyShape | Path = SMALL
    samples: int = 1
    log_normal: bool = False
    eos: bool = False
    bf16: bool = False
    budget: int = 16384
    vocabulary: int = 0
    """Vocabulary of embeddings and head, if larger than the tokenizer's."""
    rounding: float = 1.0
    """Factor of the tolerances of the first step: 30 trained layers in bfloat16 round far more than the small models.

    At 30 M it is our greatest distance to float64 (benchmarks/rounding.py): over four seeds SFT's loss lies up to 1.1e-4 away (TRL's
    6.3e-5) and its norm 1.0e-3 (9.5e-4); over two seeds DPO's norm 9.9e-4 (7.8e-4). Neither side is nearer in every seed.
    The gradient of GRPO, whose advantages cancel, rounds most: 0.0065 apart in bfloat16, and 3e-7 in float32 (8 answers of 16 tokens).
    """


CASES = (
    Case("sft", "sft", 64, 20, 8, (16, 44), 64, 2.0),
    Case("sft-uneven", "sft", 32, 4, 8, (16, 512), 8, 2.5, log_normal=True),
    Case("rm", "rm", 32, 20, 8, (16, 44), 32, 1.5),
    Case("dpo", "dpo", 32, 12, 8, (16, 44), 32, 2.5),
    Case("dpo-long", "dpo", 32, 3, 256, (16, 44), 32, 2.5),
    Case("grpo", "grpo", 32, 6, 8, (44, 44), 256, 2.0, samples=8),
    Case("gspo", "gspo", 32, 6, 8, (44, 44), 256, 2.0, samples=8),
    Case("dapo", "dapo", 32, 6, 8, (44, 44), 256, 2.0, samples=8),
    Case("grpo-long", "grpo", 32, 2, 256, (44, 44), 64, 5.0, samples=8),
    Case("grpo-uneven", "grpo", 8, 2, 8, (16, 512), 16, 2.5, samples=8, log_normal=True),
    Case("sft-30m-bf16", "sft", 16, 2, 8, (16, 44), 16, 1.5, MIDDLE, bf16=True, rounding=11),
    Case("dpo-30m-bf16", "dpo", 8, 2, 64, (16, 44), 8, 1.5, MIDDLE, bf16=True, rounding=10),
    Case("grpo-30m-bf16", "grpo", 8, 1, 64, (32, 32), 64, 1.5, MIDDLE, samples=8, bf16=True),
    Case("sft-stories", "sft", 32, 6, 32, (64, 128), 32, 1.0, STORIES),
    Case("dpo-stories", "dpo", 16, 4, 64, (32, 64), 16, 1.0, STORIES),
    Case("sft-135m-bf16", "sft", 8, 2, 8, (16, 44), 8, 1.0, SMOLLM2, bf16=True, rounding=50),
    Case("grpo-135m-bf16", "grpo", 8, 1, 64, (64, 64), 16, 1.0, SMOLLM2, samples=8, bf16=True, rounding=100),
    Case("sft-vocabulary", "sft", 8, 2, 8, (16, 44), 8, 1.0, vocabulary=151_936),
    Case("dpo-vocabulary", "dpo", 4, 2, 64, (16, 44), 4, 1.0, vocabulary=151_936),
)


BY_NAME = {case.name: case for case in CASES}
QUICK = ("sft", "rm", "dpo", "grpo-long")
TITLE = "# Training steps against TRL\n\nMade by `python benchmarks/training.py --write`.\n"
ABOUT = """TRL {trl}, torch {torch}, transformers {transformers}; {machine}; one thread a side; float32 unless the case says bf16.
Median of {repeats} alternating runs (least to greatest). Processor: ratio of processor times, which other work on the machine touches
less. Same work: how far loss and gradient norm of the first step lie apart on the same tokens. Prompts have 8 tokens; -long 256; -30m 8
(SFT) and 64. -uneven is log-normal answers of 16 to 512 tokens, which grpo-uneven is given, so that it samples none. -stories is the
pre-trained stories260k, prompts of 32 and 64; -vocabulary the 0.3 M model with 151,936 words. Our memory is as the pipeline's steps set it.
Loading and a full garbage collection before the run are kept out of both times; in bf16 the tolerance of `same work` is the distance of a
side to float64 (benchmarks/rounding.py). Wanted 1: not slower.

| case | posttrain, s | TRL, s | ratio | processor | wanted | same work: loss, gradient norm |
|---|---|---|---|---|---|---|"""

SHOWN = "Where our processor time goes:\n\n![shares of the processor's time by kind of operator, one bar a case](training.png)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default="", help="names, separated by commas; all where empty")
    parser.add_argument("--quick", action="store_true", help="one repeat of the four shortest cases, under two minutes")
    parser.add_argument("--cold", action="store_true", help="no warm-up run, for cases whose steps take minutes")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/training.md")
    parser.add_argument("--trl", type=Path, default=Path(".venv-trl/bin/python"), help="the Python that has TRL")
    args = parser.parse_args()
    if not args.trl.exists():
        sys.exit(f"error: no Python with TRL at {args.trl}; make it with: benchmarks/peers/setup.sh trl")
    here = [case.name for case in CASES if not isinstance(case.shape, Path) or case.shape.is_dir()]
    names = args.cases.split(",") if args.cases else list(QUICK) if args.quick else here
    if unknown := [name for name in names if name not in BY_NAME]:
        sys.exit(f"error: no case {unknown[0]!r}; there are: {', '.join(BY_NAME)}")
    repeats = 1 if args.quick else args.repeats
    with tempfile.TemporaryDirectory() as folder, sides(args.trl, Path(folder)) as workers:
        versions = asked(workers, "TRL", {"kind": "versions"})
        said = [ABOUT.format(repeats=repeats, machine=machine(), **versions)]
        print(said[0])
        for name in names:
            said.append(line(BY_NAME[name], measured(BY_NAME[name], Path(folder), workers, repeats, not args.cold)))
            print(said[-1], flush=True)
        profiles = {
            name: asked(
                workers,
                "posttrain",
                job(BY_NAME[name], saved_model(BY_NAME[name], Path(folder)), 0, False) | {"profile": True},
            )
            for name in (names if args.write else ())
        }
    if args.write:
        draw({name: profile["shares"] for name, profile in profiles.items()}, PICTURE)
        TABLE.write_text("\n".join([TITLE, *said, "", SHOWN]) + "\n", encoding="utf-8")


def machine() -> str:
    """Return the processor's name, if Linux reports it, and the number of processors."""
    info = Path("/proc/cpuinfo")
    names = [row.split(":")[1].strip() for row in info.read_text().splitlines() if row.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


Workers = Mapping[str, "subprocess.Popen[str]"]


@contextmanager
def sides(trl: Path, folder: Path) -> Iterator[Workers]:
    """Start one process per side, with one thread; both end with the context."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    ours = environ | {"PYTHONPATH": str(HERE.parent)}
    with ExitStack() as stack:
        logs = {side: stack.enter_context((folder / f"{side}.log").open("w+")) for side in SIDES}
        workers = {}
        for side, command, environment in (
            ("posttrain", [sys.executable, str(HERE / "peers/ours.py")], ours),
            ("TRL", [str(trl), str(HERE / "peers/trl_side.py")], environ),
        ):
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=logs[side], text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            workers[side] = process
        try:
            yield workers
        except BrokenWorkerError as error:
            sys.exit(f"error: {error.side} stopped: {Path(logs[error.side].name).read_text()[-3000:]}")


class BrokenWorkerError(Exception):
    """A side ended during a job."""

    def __init__(self, side: str) -> None:
        super().__init__(side)
        self.side = side


def asked(workers: Workers, side: str, job: Mapping[str, Any]) -> dict[str, Any]:
    worker = workers[side]
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
    except BrokenPipeError as error:
        raise BrokenWorkerError(side) from error
    answer = worker.stdout.readline()
    if not answer:
        raise BrokenWorkerError(side)
    said: dict[str, Any] = json.loads(answer)
    return said


@dataclass
class Measured:
    loss: float
    norm: float
    seconds: dict[str, list[float]]
    processor: dict[str, list[float]]


def measured(
    case: Case,
    folder: Path,
    workers: Workers,
    repeats: int,
    warm: bool = True,
    jobs: Callable[..., dict[str, Any]] | None = None,
) -> Measured:
    """Show that the work is equal, then return `repeats` timed runs of each side in turn, after one warm-up run each.

    jobs: makes the jobs in place of `job`, with the same arguments.
    """
    made = jobs or job
    model = saved_model(case, folder)
    proof = made(case, model, seed=0, given=True)
    first = {side: asked(workers, side, proof | {"steps": 1}) for side in SIDES}
    loss, norm = (_difference(first, name) for name in ("losses", "grad_norms"))
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    processor: dict[str, list[float]] = {side: [] for side in SIDES}
    for repeat in range(0 if warm else 1, repeats + 1):
        work = made(case, model, seed=repeat, given=False)
        for side in SIDES:
            took = asked(workers, side, work)
            if repeat:
                seconds[side].append(took["seconds"])
                processor[side].append(took["processor"])
    return Measured(loss, norm, seconds, processor)


def _difference(first: Mapping[str, Mapping[str, Any]], name: str) -> float:
    ours, theirs = (float(first[side][name][0]) for side in SIDES)
    return abs(ours - theirs) / max(1.0, abs(theirs))


def saved_model(case: Case, folder: Path) -> str:
    if isinstance(case.shape, Path):
        return str(case.shape)
    path = folder / f"{case.shape.hidden_size}-{case.shape.max_length}-{case.vocabulary}"
    scorer = folder / f"{path.name}-scorer"
    if not path.exists():
        model, tokenizer = tiny_model(case.shape, seed=0)
        if case.vocabulary:
            torch.manual_seed(0)
            model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
        save_model(model, tokenizer, path, "# A model for a benchmark\n")
        head = load_new_scorer(path)
        torch.nn.init.normal_(head.score.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        save_model(head, tokenizer, scorer, "# A scorer for a benchmark\n")
    return str(scorer if case.kind == "rm" else path)


def job(case: Case, model: str, seed: int, given: bool) -> dict[str, Any]:
    """Return the job that both sides read; rows are drawn from the seed."""
    drawn = np.random.Generator(np.random.PCG64(seed))
    count = case.batch * case.steps
    prompts = [_text(drawn, case.prompt) for _ in range(count)]
    answers = [[_ids(drawn, _length(drawn, case)) for _ in range(max(2, case.samples))] for _ in range(count)]
    ids = byte_tokenizer(1024)
    rows: list[Any] = [[ids(text)["input_ids"], *pair[:2]] for text, pair in zip(prompts, answers, strict=True)]
    on_policy = case.kind in ("grpo", "gspo", "dapo", "async")
    if on_policy:
        rows, prompts = list(prompts), prompts
    elif case.kind == "sft":
        rows = [row[:2] for row in rows]
    if given and on_policy:
        rows = rows[: case.batch]
    use_given = on_policy and (given or case.log_normal or case.kind == "async")
    return {
        "kind": case.kind, "model": model, "rows": rows, "batch": case.batch, "steps": case.steps, "samples": case.samples,
        "answers": dict(zip(prompts, answers, strict=True)) if use_given else None, "new_tokens": case.answer[1], "eos": case.eos,
        "bf16": case.bf16, "learning_rate": 1e-4, "micro_rows": case.micro_rows, "budget": case.budget,
    }  # fmt: skip


def _text(drawn: np.random.Generator, length: int) -> str:
    return "".join(chr(c) for c in drawn.integers(97, 123, size=length))


def _ids(drawn: np.random.Generator, length: int) -> list[int]:
    return [int(i) for i in drawn.integers(3, 250, size=length - 1)] + [2]


def _length(drawn: np.random.Generator, case: Case) -> int:
    low, high = case.answer
    if case.log_normal:
        return int(np.clip(np.exp(drawn.normal(4.4, 0.9)), low, high))
    return int(drawn.integers(low, high + 1))


def line(case: Case, found: Measured) -> str:
    cells = [
        f"{statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f})"
        for taken in (found.seconds[side] for side in SIDES)
    ]
    by_clock, by_processor = (
        statistics.median(taken["TRL"]) / statistics.median(taken["posttrain"])
        for taken in (found.seconds, found.processor)
    )
    same = "yes" if max(found.loss / LOSS_TOLERANCE, found.norm / NORM_TOLERANCE) < case.rounding else "NO"
    return (
        f"| {case.name} | {' | '.join(cells)} | {by_clock:.2f} | {by_processor:.2f} | {case.bar:g} |"
        f" {same}: {found.loss:.1e}, {found.norm:.1e} |"
    )


def draw(profiles: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Plot one bar per case, with its parts by kind of operator."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.36 * len(profiles)), layout="constrained")
    names = list(profiles)
    left = np.zeros(len(names))
    for group, colour in zip(
        profiles[names[0]], ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#999999"), strict=True
    ):
        part = np.array([profiles[name][group] / sum(profiles[name].values()) for name in names])
        axes.barh(names, part, left=left, label=group, color=colour, height=0.7)
        left += part
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the processor's time")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()

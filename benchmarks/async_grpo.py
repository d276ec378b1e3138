"""Compare the update on given answers with TRL's AsyncGRPOTrainer, which computes a shared prompt once: one thread each, alternating.

    python benchmarks/async_grpo.py [--repeats 5] [--cases async,async-2048] [--write]

TRL runs in its own environment, which `benchmarks/peers/setup.sh trl` creates. Answers with the log-probabilities of the weights that
sampled them are given to both sides. First, loss and gradient norm of the first step must agree. `benchmarks/training.py` has the rest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.training import MIDDLE, SMALL, Case, asked, job, line, machine, measured, sides
from posttrain.data.tokens import Tokens
from posttrain.models.folders import load_encoder, load_policy
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy

TABLE = Path(__file__).parent / "async_grpo.md"
LONG = replace(SMALL, max_length=4096)
CASES = (
    Case("async", "async", 32, 6, 8, (44, 44), 256, 1.0, samples=8),
    Case("async-long", "async", 32, 3, 256, (44, 44), 256, 1.0, samples=8),
    Case("async-2048", "async", 4, 3, 2048, (44, 44), 32, 1.0, LONG, samples=8),
    Case("async-uneven", "async", 8, 6, 8, (16, 512), 64, 1.0, samples=8, log_normal=True),
    Case("async-30m", "async", 2, 1, 256, (44, 44), 16, 1.0, MIDDLE, samples=8),
)
BY_NAME = {case.name: case for case in CASES}
TITLE = "# The update against TRL's AsyncGRPOTrainer\n\nMade by `python benchmarks/async_grpo.py --write`.\n"
ABOUT = """TRL {trl}, torch {torch}, transformers {transformers}; {machine}; one thread a side; float32.
Median of {repeats} alternating runs (least to greatest). Processor: ratio of processor times, which other work on the machine touches less;
other pages show it. Same work: how far loss and gradient norm of the first step lie apart on the same tokens. Each step updates on given
groups of 8 answers; nothing is sampled. Prompts have 8 tokens; -long 256; -2048 2,048; -30m 256. Answers have 44; -uneven
log-normal 16 to 512.

Both sides compute a shared prompt once and have the same loss: the clipped ratio to the sampler's log-probabilities (0.2 below, 0.28
above), A = R - mean, a mean over the update's tokens, no reference. Here that is DAPO with `anchor: rollout`, one update a step and all
groups; there `epsilon=0.2, epsilon_high=0.28, token_budget=-1` and one micro-batch, because AsyncGRPOTrainer averages per micro-batch.

AsyncGRPOTrainer has no attention for CPUs: its only one is FlashAttention 3 (`attn_implementation="tree_fa3"`). SDPA over its segments
takes that kernel's place, in the fastest form of five that were tried. The trainer asks CUDA for the device's name, which is skipped. Its
head scores only the answers, as on a GPU; on a CPU it would score prompts too. Planner, packing, loss, optimiser and loop are TRL's own
code. Its answers are queued before the clock starts, and the garbage collection at its start finds nothing to walk through; ours are
scored and compared in groups within it.

| case | posttrain, s | TRL, s | ratio | processor | wanted | same work: loss, gradient norm |
|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default=",".join(BY_NAME), help="names, separated by commas")
    parser.add_argument("--write", action="store_true", help=f"write the table to benchmarks/{TABLE.name}")
    parser.add_argument("--trl", type=Path, default=Path(".venv-trl/bin/python"), help="the Python that has TRL")
    args = parser.parse_args()
    if not args.trl.exists():
        sys.exit(f"error: no Python with TRL at {args.trl}; make it with: benchmarks/peers/setup.sh trl")
    if unknown := [name for name in args.cases.split(",") if name not in BY_NAME]:
        sys.exit(f"error: no case {unknown[0]!r}; there are: {', '.join(BY_NAME)}")
    with tempfile.TemporaryDirectory() as folder, sides(args.trl, Path(folder)) as workers:
        versions = asked(workers, "TRL", {"kind": "versions"})
        lines = [ABOUT.format(repeats=args.repeats, machine=machine(), **versions)]
        print(lines[0])
        for case in map(BY_NAME.__getitem__, args.cases.split(",")):
            lines.append(line(case, measured(case, Path(folder), workers, args.repeats, jobs=given_job)))
            print(lines[-1], flush=True)
    if args.write:
        TABLE.write_text("\n".join([TITLE, *lines]) + "\n", encoding="utf-8")


def given_job(case: Case, model: str, seed: int, given: bool) -> dict[str, Any]:
    """Return a job with answers and the log-probabilities of the policy that sampled them: the model's, with an error of 0.1 nats.

    The error imitates older weights. It makes the ratios differ from 1, so that some tokens are clipped.
    """
    work = job(case, model, seed, given)
    drawn = np.random.Generator(np.random.PCG64(seed))
    policy, encoder = Policy(load_policy(model)).eval(), load_encoder(model)
    prompts = {text: tuple(encoder.prompt(text)) for text in work["answers"]}
    tokens = [Tokens(prompts[text], tuple(ids)) for text, answers in work["answers"].items() for ids in answers]
    numbers = iter(token_logprobs(policy, tokens, case.budget))
    return work | {
        "logprobs": {
            text: [[float(x) for x in next(numbers).logprobs + drawn.normal(0, 0.1, len(ids))] for ids in answers]
            for text, answers in work["answers"].items()
        }
    }


if __name__ == "__main__":
    main()

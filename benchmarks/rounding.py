"""Measure how far the first step of each side of benchmarks/training.py lies from the same step in float64.

    python benchmarks/rounding.py [--cases sft-30m-bf16,dpo-30m-bf16] [--seeds 4] [--trl .venv-trl/bin/python]

In bfloat16 the two sides round in different places, so that neither is the other's reference: `Case.rounding` is our greatest
distance to float64, in tolerances. Only given rows are read (SFT and DPO); numbers do not depend on the load of the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import training
from benchmarks.peers import ours
from posttrain.data.batches import micro_batches
from posttrain.models.inference import token_logprobs

CASES = ("sft-30m-bf16", "dpo-30m-bf16")
HEAD = """| case | seed | side | loss: distance to float64 | gradient norm: distance |
|---|---|---|---|---|"""


def exact_step(job: Mapping[str, Any]) -> tuple[float, float]:
    """Return loss and gradient norm of the job's first step in float64."""
    policy = ours.Policy(ours.load_policy(job["model"]).double()).eval()
    rows, objective = _rows(job, policy)
    counts = objective.counts(rows)
    total = 0.0
    for group in micro_batches([objective.sequences(row) for row in rows], job["budget"]):
        terms = objective.terms(policy, [rows[i] for i in group])
        loss = torch.stack([value * (weight / counts[count]) for value, count, weight in terms.losses.values()]).sum()
        loss.backward()
        total += float(loss)
    gradients = [each.grad for each in policy.parameters() if each.grad is not None]
    return total, float(torch.nn.utils.get_total_norm(gradients))


def _rows(job: Mapping[str, Any], policy: ours.Policy) -> tuple[list[Any], Any]:
    given = job["rows"][: job["batch"]]
    if job["kind"] == "sft":
        rows = [ours.Example(ours.Tokens(tuple(prompt), tuple(answer))) for prompt, answer in given]
        return rows, ours.SupervisedObjective()
    tokens = [ours.Tokens(tuple(prompt), tuple(answer)) for prompt, *pair in given for answer in pair]
    measured = token_logprobs(policy, tokens, job["budget"])
    answers = [ours.Answer(t, numbers.logprobs) for t, numbers in zip(tokens, measured, strict=True)]
    pairs = [ours.PreferencePair(answers[i], answers[i + 1]) for i in range(0, len(answers), 2)]
    return pairs, ours.PreferenceObjective(ours.DPO)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, default=Path(".venv-trl/bin/python"), help="the Python that has TRL")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder, training.sides(args.trl, Path(folder)) as workers:
        for case in (training.BY_NAME[name] for name in args.cases.split(",")):
            for seed in range(args.seeds):
                job = training.job(case, training.saved_model(case, Path(folder)), seed, True)
                exact = exact_step(job)
                for side in training.SIDES:
                    found = training.asked(workers, side, job | {"steps": 1})
                    pair = (found["losses"][0], found["grad_norms"][0])
                    cells = [f"{(a - b) / max(1.0, abs(b)):+.1e}" for a, b in zip(pair, exact, strict=True)]
                    print(f"| {case.name} | {seed} | {side} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

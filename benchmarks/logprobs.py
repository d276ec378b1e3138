"""Log-probability and entropy of the taken tokens at a large vocabulary, forward and backward: fused with the head against the whole table.

    python benchmarks/logprobs.py [--repeats 3] [--tokens 4096] [--hidden 256] [--vocabulary 151936]

Every measurement is a process of its own, one thread, the ways alternating. Memory is the process's peak above what it held before the
first pass (the head, the hidden states and their gradients included). The gradients of the two float32 ways are compared as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import psutil
import torch

from posttrain.models.logprobs import taken_logprobs

WAYS = ("whole table", "fused", "fused, bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("repeats", 3), ("tokens", 4096), ("hidden", 256), ("vocabulary", 151_936)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.tokens, args.hidden, args.vocabulary)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, *sys.argv[1:]]
            runs[way].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(
        f"torch {torch.__version__}, {args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocabulary}, one thread\n"
    )
    print("| way | seconds, median (range) | speed | peak MiB | memory | gradient norms: hidden, head |")
    print("|---|---|---|---|---|---|")
    base = {key: statistics.median(run[key] for run in runs[WAYS[0]]) for key in ("seconds", "mebibytes")}
    for way, measured in runs.items():
        seconds = [run["seconds"] for run in measured]
        peak = statistics.median(run["mebibytes"] for run in measured)
        speed, share = base["seconds"] / statistics.median(seconds), base["mebibytes"] / peak
        print(
            f"| {way} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {speed:.2f} x"
            f" | {peak:,.0f} | 1/{share:.1f} | {measured[0]['of_hidden']:.6g}, {measured[0]['of_head']:.6g} |"
        )


def measure(way: str, tokens: int, hidden: int, vocabulary: int) -> dict[str, float]:
    """One forward and backward pass."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator, requires_grad=True)
    head = (torch.randn(vocabulary, hidden, generator=generator) * hidden**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    before = held_mebibytes()
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bf16")):
        logprobs, entropy = (whole_table if way == WAYS[0] else fused)(states, head, targets)
    (-logprobs.sum() / tokens).backward()
    seconds = time.perf_counter() - started
    assert states.grad is not None
    assert head.grad is not None
    assert bool(torch.isfinite(entropy).all())
    return {
        "seconds": seconds, "mebibytes": peak_mebibytes() - before,
        "of_hidden": float(states.grad.norm()), "of_head": float(head.grad.norm()),
    }  # fmt: skip


def whole_table(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    table = (states @ head.T).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(table.exp() * table).sum(-1)
    return table.gather(-1, targets[:, None])[:, 0], entropy


def fused(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return taken_logprobs(states, head, None, targets, 1.0)


def held_mebibytes() -> float:
    return psutil.Process().memory_info().rss / 2**20


def peak_mebibytes() -> float:
    """The most that this process has held; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

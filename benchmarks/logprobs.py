"""Measure log-probability and entropy of selected tokens with a large vocabulary, forward and backward: fused head against full logits.

    python benchmarks/logprobs.py [--repeats 3] [--tokens 4096] [--hidden 256] [--vocabulary 151936] [--write]

Every measurement is a separate process with one thread and the pipeline's memory settings; the variants alternate. The memory in the
table is the process's peak minus its memory before the first pass, and includes the gradients of head and hidden states. The gradient
norms show that the variants compute the same values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from pipelines.runtime.machine import peak_resident_mib
from posttrain.models.allocator import keep_heap
from posttrain.models.logprobs import selected_logprobs

TITLE = "# Log-probability and entropy of the taken tokens at a large vocabulary\n\nMade by `python benchmarks/logprobs.py --write`.\n"
WAYS = ("whole table", "fused", "fused, bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("repeats", 3), ("tokens", 4096), ("hidden", 256), ("vocabulary", 151_936)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/logprobs.md")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.tokens, args.hidden, args.vocabulary)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, *sys.argv[1:]]
            runs[way].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    said = [
        f"torch {torch.__version__}, {args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocabulary}, one thread, "
        f"{args.repeats} alternating runs.\n",
        "| way | seconds, median (range) | speed | of the processor, s | speed | peak MiB | memory | gradient norms: hidden, head |",
        "|---|---|---|---|---|---|---|---|",
        *(row(way, measured, runs[WAYS[0]]) for way, measured in runs.items()),
    ]
    print("\n".join(said))
    if args.write:
        text = "\n".join([TITLE, *said]) + "\n"
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


def row(way: str, measured: list[dict[str, float]], base: list[dict[str, float]]) -> str:
    def median(name: str, runs: list[dict[str, float]]) -> float:
        return statistics.median(run[name] for run in runs)

    seconds = [run["seconds"] for run in measured]
    by_clock, by_processor, memory = (
        median(name, base) / median(name, measured) for name in ("seconds", "processor", "mebibytes")
    )
    return (
        f"| {way} | {median('seconds', measured):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | {by_clock:.2f} x"
        f" | {median('processor', measured):.1f} | {by_processor:.2f} x | {median('mebibytes', measured):,.0f} | 1/{memory:.1f}"
        f" | {measured[0]['of_hidden']:.6g}, {measured[0]['of_head']:.6g} |"
    )


def measure(way: str, tokens: int, hidden: int, vocabulary: int) -> dict[str, float]:
    """Run one forward and backward pass."""
    torch.set_num_threads(1)
    keep_heap()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator, requires_grad=True)
    head = (torch.randn(vocabulary, hidden, generator=generator) * hidden**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    before = held_mebibytes()
    started, used = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bf16")):
        logprobs, entropy = (whole_table if way == WAYS[0] else fused)(states, head, targets)
    (-logprobs.sum() / tokens).backward()
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    assert states.grad is not None
    assert head.grad is not None
    assert bool(torch.isfinite(entropy).all())
    return {
        "seconds": seconds, "processor": processor, "mebibytes": peak_resident_mib() - before,
        "of_hidden": float(states.grad.norm()), "of_head": float(head.grad.norm()),
    }  # fmt: skip


def whole_table(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    table = (states @ head.T).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(table.exp() * table).sum(-1)
    return table.gather(-1, targets[:, None])[:, 0], entropy


def fused(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return selected_logprobs(states, head, None, targets, 1.0)


def held_mebibytes() -> float:
    return psutil.Process().memory_info().rss / 2**20


if __name__ == "__main__":
    main()

"""Measure how the time of a training step grows with processes, tokens, answers per prompt, and threads.

    python benchmarks/scaling.py [--rounds 5] [--small] [--write]

All compared variants are alive at the same time and take turns, with one thread each unless threads are compared. Two processes train
with DDP over gloo, as `accelerate launch` starts them; they wait at a pipe while one process is timed, and vice versa. Reported are
medians, with minimum and maximum in brackets. Wall time of processes is unreliable on a shared machine, so processor time is given as
well; for two processes it is the slower one's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from posttrain.algorithms import PRESETS
from posttrain.data.tokens import Tokens
from posttrain.models.allocator import keep_heap
from posttrain.models.policy import Policy
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.network import free_port
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import OptimizerSettings
from posttrain.training.onpolicy import Experience, OnPolicyObjective
from posttrain.training.supervised import Example, SupervisedObjective
from posttrain.training.trainer import Trainer

SMALL = TinyShape(max_length=1024)
MIDDLE = TinyShape(hidden_size=256, intermediate_size=768, layers=4, heads=4, kv_heads=2, max_length=1024)
LARGE = TinyShape(hidden_size=512, intermediate_size=1536, layers=9, heads=8, kv_heads=4, max_length=1024)
PROMPT, ANSWER, PROMPTS = 256, 44, 4
Seconds = list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step of the large model")
    parser.add_argument("--small", action="store_true", help="the smallest model everywhere: a check of the script")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/scaling.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_heap()
    large = SMALL if args.small else LARGE
    if args.worker:
        work(large, args.tokens)
        return
    text = "\n".join(
        [
            "# How the time of a training step grows\n",
            f"`python benchmarks/scaling.py --rounds {args.rounds}`: torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores,"
            f" load {os.getloadavg()[0]:.1f} at the start.\n",
            *processes(large, args),
            *tokens(args.rounds),
            *answers(args.rounds),
            *threads([SMALL] if args.small else [SMALL, MIDDLE, LARGE], args.rounds),
        ]
    )
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def processes(shape: TinyShape, args: argparse.Namespace) -> list[str]:
    """Compare one process with two, on the same rows."""
    one, two = Team(1, args), Team(2, args)
    times: dict[str, list[tuple[float, float]]] = {"one": [], "two": []}
    try:
        for team in (one, two):
            team.step()
        for _ in range(args.rounds):
            times["one"].append(one.step())
            times["two"].append(two.step())
    finally:
        one.close()
        two.close()
    lines = [
        f"## Processes\n\nSFT, {parameters(shape):,} parameters, {args.tokens} tokens a step.\n",
        "| | seconds a step | seconds of the processor |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {shown([t[0] for t in seconds])} | {shown([t[1] for t in seconds])} |"
        for name, seconds in times.items()
    ]
    ratios = [
        statistics.median(t[i] for t in times["one"]) / statistics.median(t[i] for t in times["two"]) for i in (0, 1)
    ]
    return [*lines, f"| one / two | **{ratios[0]:.2f}** | {ratios[1]:.2f} |\n"]


class Team:
    """Processes that run a step on request."""

    def __init__(self, count: int, args: argparse.Namespace) -> None:
        port = free_port()
        group = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [
            sys.executable,
            __file__,
            "--worker",
            "--tokens",
            str(args.tokens),
            *(["--small"] if args.small else []),
        ]
        self.members = [
            subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
                | (group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}),
            )
            for rank in range(count)
        ]  # fmt: skip

    def step(self) -> tuple[float, float]:
        """Return the wall time, and the largest processor time of the members, in seconds."""
        started = time.perf_counter()
        for member in self.members:
            assert member.stdin is not None
            member.stdin.write("step\n")
            member.stdin.flush()
        said = [member.stdout.readline() for member in self.members if member.stdout is not None]
        return time.perf_counter() - started, max(float(line) for line in said)

    def close(self) -> None:
        for member in self.members:
            assert member.stdin is not None
            member.stdin.close()
        for member in self.members:
            member.wait(60)


def work(shape: TinyShape, count: int) -> None:
    """Run one step per input line and print its processor time in seconds. The main function of a member."""
    accelerator = Accelerator(cpu=True)
    trainer = trainer_of(shape, accelerator=accelerator)
    rows = [Example(t) for t in random_rows(count // 128, 64, 64)]
    objective = SupervisedObjective()
    for _ in sys.stdin:
        started = time.process_time()
        trainer.update(rows, objective)
        print(time.process_time() - started, flush=True)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def tokens(rounds: int) -> list[str]:
    """Measure steps of 2,048 to 16,384 tokens."""
    trainer, objective = trainer_of(SMALL), SupervisedObjective()
    sizes = [2048, 4096, 8192, 16384]
    batches = {size: [Example(t) for t in random_rows(size // 128, 64, 64)] for size in sizes}
    times = in_turn({size: lambda size=size: trainer.update(batches[size], objective) for size in sizes}, rounds)
    lines = [
        f"## Tokens\n\nSFT, {parameters(SMALL):,} parameters.\n",
        "| tokens a step | ms | microseconds a token | against 2,048 |",
        "|---|---|---|---|",
    ]
    each = {size: statistics.median(seconds) / size for size, seconds in times.items()}
    lines += [
        f"| {size:,} | {shown(times[size], 1e3)} | {1e6 * each[size]:.1f} | {each[size] / each[2048]:.2f} |"
        for size in sizes
    ]
    return [*lines, ""]


def answers(rounds: int) -> list[str]:
    """Measure sampling and update of groups with 1 and with 8 answers to the same prompts."""
    trainer = trainer_of(SMALL)
    objective = OnPolicyObjective(PRESETS["grpo"], ANSWER, 1.0)
    engine = NativeEngine(trainer.unwrapped.lm, ends=())
    prompts = [t.prompt for t in random_rows(PROMPTS, PROMPT, 1)]
    rows = {group: experiences(prompts, group) for group in (1, 8)}
    sampling = SamplingSettings(ANSWER, 1.0)
    asked = {g: [Request(p, tuple((i, j) for j in range(g))) for i, p in enumerate(prompts)] for g in (1, 8)}
    updates = in_turn({g: lambda g=g: trainer.update(rows[g], objective) for g in (1, 8)}, rounds)
    samples = in_turn({g: lambda g=g: engine.sample(asked[g], sampling) for g in (1, 8)}, rounds)
    lines = [
        f"## Answers to a prompt\n\nGRPO, {parameters(SMALL):,} parameters, {PROMPTS} prompts of {PROMPT} tokens, answers of {ANSWER}.\n",
        "| | 1 answer, ms | 8 answers, ms | 8 / 1 |",
        "|---|---|---|---|",
    ]
    both = {g: [u + s for u, s in zip(updates[g], samples[g], strict=True)] for g in (1, 8)}
    for name, times in (("sampling", samples), ("update", updates), ("step", both)):
        ratio = statistics.median(times[8]) / statistics.median(times[1])
        lines.append(f"| {name} | {shown(times[1], 1e3)} | {shown(times[8], 1e3)} | **{ratio:.2f}** |")
    return [*lines, ""]


def threads(shapes: Sequence[TinyShape], rounds: int) -> list[str]:
    """Compare one thread with all cores."""
    cores = len(os.sched_getaffinity(0))
    lines = [
        "## Threads\n\nSFT, 1,024 tokens a step.\n",
        f"| parameters | 1 thread, ms | {cores} threads, ms | 1 / {cores} |",
        "|---|---|---|---|",
    ]
    for shape in shapes:
        trainer, objective = trainer_of(shape), SupervisedObjective()
        rows = [Example(t) for t in random_rows(8, 64, 64)]

        def step(count: int, trainer: Any = trainer, rows: Any = rows, objective: Any = objective) -> None:
            torch.set_num_threads(count)
            trainer.update(rows, objective)

        times = in_turn({count: lambda count=count: step(count) for count in (1, cores)}, rounds)
        ratio = statistics.median(times[1]) / statistics.median(times[cores])
        lines.append(f"| {parameters(shape):,} | {shown(times[1], 1e3)} | {shown(times[cores], 1e3)} | {ratio:.2f} |")
    torch.set_num_threads(1)
    return lines


def in_turn(things: dict[int, Callable[[], Any]], rounds: int) -> dict[int, Seconds]:
    """Return the seconds of each variant, after one warm-up round."""
    times: dict[int, Seconds] = {name: [] for name in things}
    for number in range(rounds + 1):
        for name, do in things.items():
            started = time.perf_counter()
            do()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def trainer_of(shape: TinyShape, **options: Any) -> Trainer[Any]:
    policy = Policy(tiny_model(shape, 0)[0])
    return Trainer(policy, OptimizerSettings(1e-5), total_steps=10_000, micro_batch_tokens=4096, **options)


def random_rows(count: int, prompt: int, answer: int) -> list[Tokens]:
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 259, (count, prompt + answer))
    return [Tokens(tuple(map(int, row[:prompt])), tuple(map(int, row[prompt:]))) for row in ids]


def experiences(prompts: Sequence[tuple[int, ...]], group: int) -> list[Experience]:
    generator = np.random.default_rng(1)
    made = []
    for prompt in prompts:
        for _ in range(group):
            answer = Tokens(prompt, tuple(map(int, generator.integers(3, 259, ANSWER))))
            # Mismatched sampler log-probabilities would stop the run, so both are set to those of an untrained model.
            flat = np.full(ANSWER, -np.log(259), dtype=np.float32)
            made.append(Experience(answer, np.full(ANSWER, generator.normal(), dtype=np.float32), flat, flat))
    return made


def parameters(shape: TinyShape) -> int:
    return sum(p.numel() for p in tiny_model(shape, 0)[0].parameters())


def shown(seconds: Seconds, factor: float = 1.0) -> str:
    return f"{factor * statistics.median(seconds):.3g} ({factor * min(seconds):.3g} to {factor * max(seconds):.3g})"


if __name__ == "__main__":
    main()

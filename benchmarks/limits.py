"""Measure how much of our training time is matrix products and attention, which TRL computes as well, and so the largest possible ratio.

    python benchmarks/limits.py [--trl .venv-trl/bin/python] [--repeats 2] [--write]

torch's profiler lists the shapes of all products of one of our runs. Each shape is then timed without anything around it, with its
tensors in cache. A program that did only these products and the least passes over memory would be `largest` times as fast as TRL; the two
sides take turns as in benchmarks/training.py. All times are processor time of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoConfig

from benchmarks import training
from posttrain.models.allocator import keep_heap

CASES = ("sft", "dpo", "grpo")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
SCORES = ("aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::_softmax", "aten::_softmax_backward_data")
"""Operators of attention of short segments; sampling has them, too."""
FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = f"{FORWARD}_backward"
REPEATS, SECONDS = 3, 0.01
TABLE = Path(__file__).with_suffix(".md")
HEAD = """# The most that training with short prompts can gain on a CPU

Made by `python benchmarks/limits.py --write`: {machine}, one thread, seconds of processor time, medians of {repeats}. Products: all matrix
products of our run, and attention, each shape timed without anything around it. Passes: the bytes that norms, rotations, the gate, the loss
and the optimiser must at least read and write (`bytes_passed`), at the bandwidth of the cache. Largest: TRL's time divided by the three,
the ratio of a program that does nothing else.

| case | TRL | posttrain | ratio | matrix products | attention | passes | largest ratio |
|---|---|---|---|---|---|---|---|"""


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the least processor time of one call, after a first one."""
    work()
    found = []
    for _ in range(REPEATS):
        started, calls = time.process_time(), 0
        while not calls or time.process_time() - started < SECONDS:
            work()
            calls += 1
        found.append((time.process_time() - started) / calls)
    return min(found)


def work_of(name: str, shapes: list[Any]) -> Callable[[], Any]:
    """Return one call of an operator with tensors of these shapes."""
    given = [torch.randn(shape) for shape in shapes if len(shape) > 1]
    if name == "aten::_softmax":
        return lambda: given[0].softmax(-1)
    if name == "aten::_softmax_backward_data":
        return lambda: torch.ops.aten._softmax_backward_data(given[0], given[1], -1, torch.float32)
    if name == FORWARD:
        return lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given[:3], 0.0, True)
    if name == BACKWARD:
        gradient, *states = given[:4]
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*states, 0.0, True)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return lambda: kernel(gradient, *states, *made, 0.0, True)
    left, right = given[1:3] if "add" in name else given[:2]
    return lambda: left @ right


def limits(job: dict[str, Any]) -> tuple[float, float, float]:
    """Return the seconds of all matrix products, of attention, and of the passes over memory, in our run of a job."""
    from benchmarks.peers import ours

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        ran = ours.run(job)
    products = attention = 0.0
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key in (*PRODUCTS, *SCORES, FORWARD, BACKWARD):
            spent = event.count * seconds_of(work_of(event.key, event.input_shapes))
            products, attention = (
                (products + spent, attention) if event.key in PRODUCTS else (products, attention + spent)
            )
    return products, attention, bytes_passed(job, ran["tokens"]) / bandwidth()


def bytes_passed(job: dict[str, Any], tokens: int) -> float:
    """Return the bytes that element-wise work must read or write, if each step of it were one pass and residuals were free.

    Of each trained token, forward and backward. A norm reads states and writes them, then reads gradient and states and writes a gradient:
    5 for each number, also with a rotation. The gate reads 2 and writes 1, then reads 3 and writes 2. The loss reads and writes
    logits in both directions. The optimiser reads 4 and writes 3 numbers a parameter, and the gradient's norm reads 1. A pass without
    gradient, of the reference, takes 2 of the 5 and 3 of the 8.
    """
    config = AutoConfig.from_pretrained(job["model"])
    queries = config.head_dim * config.num_attention_heads
    keys = config.head_dim * config.num_key_value_heads
    norms, gate = 2 * config.hidden_size + queries + keys, config.intermediate_size
    trained = config.num_hidden_layers * (5 * norms + 8 * gate) + 4 * config.vocab_size
    frozen = config.num_hidden_layers * (2 * norms + 3 * gate) + config.vocab_size
    weights = config.vocab_size * config.hidden_size * 2
    weights += config.num_hidden_layers * config.hidden_size * (2 * queries + 2 * keys + 3 * gate)
    reference = 0 if job["kind"] == "sft" else tokens * frozen
    return 4.0 * (tokens * trained + reference + 8 * weights * job["steps"])


def bandwidth() -> float:
    """Return the bytes a second of reading one tensor and writing it to a second one, both in the last cache (2 MiB each)."""
    source, target = torch.randn(2**19), torch.empty(2**19)
    return 2 * 2**21 / seconds_of(lambda: torch.add(source, 1, out=target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, default=Path(".venv-trl/bin/python"), help="the Python that has TRL")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/limits.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_heap()
    lines = [HEAD.format(machine=training.machine(), repeats=args.repeats)]
    print(lines[0], flush=True)
    with tempfile.TemporaryDirectory() as folder, training.sides(args.trl, Path(folder)) as workers:
        for case in (training.BY_NAME[name] for name in args.cases.split(",")):
            found = training.measured(case, Path(folder), workers, args.repeats).processor
            theirs, own = (statistics.median(found[side]) for side in ("TRL", "posttrain"))
            job = training.job(case, training.saved_model(case, Path(folder)), 1, False)
            parts = limits(job)
            numbers = (theirs, own, theirs / own, *parts, theirs / sum(parts))
            lines.append(f"| {case.name} | {' | '.join(f'{number:.2f}' for number in numbers)} |")
            print(lines[-1], flush=True)
    if args.write:
        TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

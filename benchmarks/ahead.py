"""Measure sampling ahead of training: steps per hour on two processes of one thread each, and the cost of staleness in reward.

    python benchmarks/ahead.py speed                    # steps per hour at staleness 0 and 1, alternating
    python benchmarks/ahead.py study --seeds 0 1 2      # train every staleness with these seeds; results are added to ahead.json
    python benchmarks/ahead.py study --staleness 0 1    # only these
    python benchmarks/ahead.py --write                  # write benchmarks/ahead.md from benchmarks/ahead.json

GRPO on additions from one supervised model, with ratios to the sampler's probabilities (`anchor: rollout`) at every staleness. The speed
is that of the demo's model and sizes. The study has a smaller model and two digits, where accuracy is well below 1 and seeds differ; all
arms of a seed see the same problems in the same order and answer the same held-out problems, so differences are paired by seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

import numpy as np
import psutil
import torch
from scipy import stats

import posttrain as pt
from benchmarks.silent import Silent
from posttrain.algorithms.grpo import GRPO
from posttrain.api import Model
from posttrain.environments.arithmetic import rows as arithmetic
from posttrain.rewards.functions import answer

RESULTS = Path(__file__).with_suffix(".json")
SPEC = replace(GRPO, anchor="rollout")


@dataclass(frozen=True)
class Work:
    """A task and its sizes."""

    task: dict[str, Any]
    shape: dict[str, Any]
    sft: dict[str, Any]
    grpo: dict[str, Any]


DEMO = Work(
    {"terms": 2, "max_term": 999, "careless": 0.65},
    {"hidden_size": 128, "intermediate_size": 256, "layers": 2, "heads": 4, "kv_heads": 2, "max_length": 256},
    {"rows": 4000, "steps": 120, "learning_rate": 2e-3, "batch_size": 64},
    {"learning_rate": 2e-4, "batch_size": 32, "samples": 8, "max_new_tokens": 44},
)
SMALL = Work(
    {"terms": 2, "max_term": 99, "careless": 0.65},
    {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "max_length": 96},
    {"rows": 1200, "steps": 500, "learning_rate": 3e-3, "batch_size": 32},
    {"learning_rate": 2e-4, "batch_size": 8, "samples": 8, "max_new_tokens": 32},
)
STALENESS = (0, 1, 2, 4, 8)
WARM_UP = 3
"""Steps at the start that are not timed: the process starts, and kernels are chosen."""


class Timings(Silent):
    """Keeps the timings of every step."""

    def __init__(self) -> None:
        self.kept: list[dict[str, float]] = []

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        """Add the wall time, and the processor seconds of this process and of the one that samples."""
        sampler = [child.cpu_times() for child in psutil.Process().children()]
        used = sum(times.user + times.system for times in sampler)
        self.kept.append({**values, "at": time.perf_counter(), "trainer": time.process_time(), "sampler": used})


def start(work: Work) -> Model:
    """Return the supervised model that all runs start from."""
    options = dict(work.sft)
    model = pt.tiny(seed=0, **work.shape)
    pt.train(model, "sft", arithmetic("sft", options.pop("rows"), 0, **work.task), threads=1, **options)
    return model


def trained(
    work: Work, base: Model, staleness: int, seed: int, steps: int
) -> tuple[Model, Timings, list[dict[str, float]]]:
    """Train a copy of the base model."""
    model, timings = copy.deepcopy(base), Timings()
    prompts = arithmetic("problems", 1000, 0, **work.task)
    options: dict[str, Any] = {
        "reward": "answer",
        "seed": seed,
        "staleness": staleness,
        "recorder": timings,
        "threads": 1,
    }
    return model, timings, pt.train(model, SPEC, prompts, steps=steps, **options, **work.grpo)


def step_seconds(kept: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the seconds of a step: its parts, wall time (`at`), and processor time of both processes."""
    seconds = {n: float(np.mean([k[n] for k in kept[1:]])) for n in kept[0] if n.startswith("seconds/")}
    for name in ("at", "trainer", "sampler"):
        seconds[name] = (kept[-1][name] - kept[0][name]) / (len(kept) - 1)
    return seconds


def speed(base: Model, steps: int, repeats: int) -> dict[str, Any]:
    """Return the seconds of a step at staleness 0 and 1 in alternating runs: wall time, and processor time of each process."""
    found: dict[str, Any] = {"steps": steps, "repeats": repeats, "0": [], "1": []}
    for repeat in range(repeats):
        for staleness in (0, 1):
            kept = trained(DEMO, base, staleness, repeat, steps)[1].kept[WARM_UP:]
            seconds = step_seconds(kept)
            found[str(staleness)].append(seconds)
            print(f"staleness {staleness}: {seconds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return found


def accuracy(model: Model, heldout: int) -> float:
    """Return the share of right answers to held-out problems, four sampled at temperature 1 each."""
    rows = arithmetic("evaluation", heldout, 0, **SMALL.task)
    golds, asked = [row["answer"] for row in rows], [row["prompt"] for row in rows]
    limit = SMALL.grpo["max_new_tokens"]
    texts = [model.generate(asked, max_new_tokens=limit, temperature=1.0, seed=s) for s in range(4)]
    return float(np.mean([answer(asked, each, answer=golds) for each in texts]))


def study(
    base: Model, seeds: Sequence[int], arms: Sequence[int], steps: int, heldout: int, found: dict[str, Any]
) -> None:
    """Train every staleness in `arms` with every seed that is not yet in `found`, and add the results."""
    runs = found.setdefault(
        "study", {"steps": steps, "heldout": heldout, "start": accuracy(base, heldout), "runs": {}}
    )["runs"]
    for seed in seeds:
        for staleness in arms:
            name = f"{staleness}-{seed}"
            if name in runs:
                continue
            model, timings, history = trained(SMALL, base, staleness, seed, steps)
            seconds = step_seconds(timings.kept[WARM_UP:])
            runs[name] = {
                "accuracy": accuracy(model, heldout),
                "reward": float(np.mean([step["reward/total/mean"] for step in history[-10:]])),
                "mismatch": float(np.mean([step["mismatch/mean"] for step in history])),
                "clipped": float(np.mean([step["clip/low"] + step["clip/high"] for step in history])),
                "seconds": {name: seconds[name] for name in ("at", "trainer", "sampler")},
            }
            print(f"{name}: {runs[name]}", file=sys.stderr, flush=True)
            write("study", found["study"])


def write(part: str, results: Any) -> None:
    """Add the results of one part to the file; the other part may have been written meanwhile."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    text = json.dumps(found | {part: results}, indent=1, sort_keys=True)
    RESULTS.write_text(text + "\n", encoding="utf-8")


def pairs(found: dict[str, Any], staleness: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the runs of each seed: at staleness 0, and at this one."""
    runs = found["study"]["runs"]
    seeds = sorted(int(name.partition("-")[2]) for name in runs if name.startswith("0-"))
    return [(runs[f"0-{s}"], runs[f"{staleness}-{s}"]) for s in seeds if f"{staleness}-{s}" in runs]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % t interval.

    Example:
        >>> mean, half = interval([1.0, 2.0, 3.0])  # t = 4.303, standard error 1 / sqrt(3)
        >>> mean, round(half, 3)
        (2.0, 2.484)
    """
    array = np.array(values)
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean()), float(half)


def gains(before: dict[str, float], after: dict[str, float]) -> tuple[float, float]:
    """Return how many times the steps per hour: by wall time, and by processor time if each process has a core to itself.

    Example:
        >>> gains({"at": 2.0, "trainer": 1.5}, {"at": 1.6, "trainer": 0.75, "sampler": 0.6})
        (1.25, 2.0)
    """
    return before["at"] / after["at"], before["trainer"] / max(after["trainer"], after["sampler"])


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.2f}" for number in numbers)


def speed_page(timed: dict[str, Any]) -> list[str]:
    """Return the part on speed."""
    middle = {s: {n: float(np.median([run[n] for run in timed[s]])) for n in timed[s][0]} for s in ("0", "1")}
    both = [gains(*runs) for runs in zip(timed["0"], timed["1"], strict=True)]
    walls, processors = sorted(wall for wall, _ in both), sorted(processor for _, processor in both)
    lines = [
        "GRPO on three-digit additions (the demo's model and sizes), one thread a process on two cores;"
        f" {timed['steps']} steps, {timed['repeats']} alternating repeats, medians. Seconds a step:",
        "",
        "| staleness | wall | waiting for answers, scoring | preparing | updating | processor, trainer | processor, sampler |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in middle.items():
        parts = ("at", "seconds/rollout", "seconds/prepare", "seconds/train", "trainer", "sampler")
        lines.append(f"| {name} | {' | '.join(f'{row[part]:.3f}' for part in parts)} |")
    return [
        *lines,
        "",
        f"Steps per hour, staleness 1 over 0, by wall time: **{np.median(walls):.2f}** ({_list(walls)}). By processor time, if each process"
        f" has a core to itself: **{np.median(processors):.2f}** ({_list(processors)}). The longer of the two processes is the limit.",
        "",
    ]


def study_page(found: dict[str, Any]) -> list[str]:
    """Return the part on the reward, with the speed of the same runs."""
    about = found["study"]
    lines = [
        "GRPO on two-digit additions with a smaller model, 8 x 8 answers a step, one thread a process. "
        f"Reward after {about['steps']} steps (start {100 * about['start']:.1f} %): same problems and seeds, differences from staleness 0"
        " paired by seed with 95 % t intervals. Accuracy: held-out problems. Reward: mean of the last ten steps. Mismatch: nats a token."
        " Steps per hour: of the same runs over those at staleness 0, by processor time of the longer process (each has a core to itself)"
        " and by wall time (with whatever else the machine did).",
        "",
        "| staleness | seeds | accuracy | difference | reward, difference | mismatch | clipped tokens | steps per hour | by wall time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for staleness in STALENESS:
        own = [run for name, run in about["runs"].items() if name.partition("-")[0] == str(staleness)]
        if not own:
            continue
        mean = {name: float(np.mean([run[name] for run in own])) for name in ("accuracy", "mismatch", "clipped")}
        shown = ["—"] * 4
        if staleness:
            paired = pairs(found, staleness)
            for place, name in enumerate(("accuracy", "reward")):
                gap, half = interval([after[name] - before[name] for before, after in paired])
                shown[place] = f"{100 * gap:+.1f} ± {100 * half:.1f} points"
            both = [gains(before["seconds"], after["seconds"]) for before, after in paired]
            for place, values in ((2, [processor for _, processor in both]), (3, [wall for wall, _ in both])):
                ratio, half = interval(values)
                shown[place] = f"{ratio:.2f} ± {half:.2f}"
        lines.append(
            f"| {staleness} | {len(own)} | {100 * mean['accuracy']:.1f} % | {shown[0]} | {shown[1]} | {mean['mismatch']:.4f} |"
            f" {100 * mean['clipped']:.2f} % | {shown[2]} | {shown[3]} |"
        )
    return lines


def page(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Sampling ahead of training",
        "",
        "    python benchmarks/ahead.py speed --repeats 5",
        "    python benchmarks/ahead.py study --seeds 0 1 2 3 4 5 6 7 8 9 --steps 50",
        "    python benchmarks/ahead.py --write",
        "",
        *(speed_page(found["speed"]) if "speed" in found else []),
        *(study_page(found) if "study" in found else []),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["speed", "study"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--staleness", type=int, nargs="+", default=list(STALENESS), choices=STALENESS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--heldout", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="write benchmarks/ahead.md")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if args.part == "speed":
        write("speed", speed(start(DEMO), args.steps, args.repeats))
    if args.part == "study":
        study(start(SMALL), args.seeds, args.staleness, args.steps, args.heldout, found)
    if args.write:
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        RESULTS.with_suffix(".md").write_text(page(found), encoding="utf-8")
        print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Find the runs whose true reward fell while the reward model's score stayed up, with the step at which that began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.report.load import Results, Training
from posttrain.evaluation.divergence import divergence

KL = "kl/ref_k1"


@dataclass(frozen=True)
class Hacked:
    """One diverged run. Steps are training steps."""

    seed: int
    source: str
    """The reward model."""
    began: int
    noticed: int
    level: float
    truth: float
    kl: tuple[float, float] | None
    """KL to the reference at the beginning and when it was noticed, if it was logged."""
    length: tuple[float, float] | None
    """Mean length in tokens at both steps, if it was logged."""


@dataclass(frozen=True)
class Watched:
    """The runs of one algorithm that logged a true reward and a reward model's score."""

    runs: int
    hacked: Sequence[Hacked]


def watched(results: Results, accuracy: str, models: Sequence[str]) -> dict[str, Watched]:
    """Return the algorithms whose runs can be watched, with the runs that diverged."""
    found: dict[str, Watched] = {}
    for name in results.algorithms:
        runs = [(model.seed or 0, model.training) for model in results.of(name) if model.training is not None]
        known = [(s, run, m) for s, run in runs for m in models if _names(accuracy, m) <= run.curves.keys()]
        if known:
            hacked = [one for seed, run, model in known if (one := find(seed, run, accuracy, model)) is not None]
            found[name] = Watched(len(known), hacked)
    return found


def _names(accuracy: str, model: str) -> set[str]:
    return {f"reward/{accuracy}/mean", f"reward/{model}/mean"}


def find(seed: int, run: Training, accuracy: str, model: str) -> Hacked | None:
    """Return when a run diverged, or None. `accuracy` and `model` are names of rewards."""
    (steps, truth), (others, score) = run.curves[f"reward/{accuracy}/mean"], run.curves[f"reward/{model}/mean"]
    shared, left, right = np.intersect1d(steps, others, return_indices=True)
    found = divergence(truth[left], score[right])
    if found is None:
        return None
    began, noticed = int(shared[found.began]), int(shared[found.noticed])
    ends = [_both(run, metric, began, noticed) for metric in (KL, "length/mean")]
    return Hacked(seed, model, began, noticed, found.level, found.truth, *ends)


def _both(run: Training, metric: str, began: int, noticed: int) -> tuple[float, float] | None:
    table = dict(zip(*(values.tolist() for values in run.curves[metric]), strict=True)) if metric in run.curves else {}
    return (table[began], table[noticed]) if began in table and noticed in table else None


def sentences(found: Mapping[str, Watched]) -> list[str]:
    """Return one sentence for each algorithm with a diverged run."""
    return [_sentence(name, own) for name, own in found.items() if own.hacked]


def _sentence(name: str, own: Watched) -> str:
    first = min(own.hacked, key=lambda one: (one.began, one.seed))
    also = [f"KL {first.kl[0]:.1f} to {first.kl[1]:.1f} nats"] if first.kl else []
    also += [f"length {first.length[0]:.0f} to {first.length[1]:.0f} tokens"] if first.length else []
    which = f" (seed {first.seed})" if own.runs > 1 else ""
    return (
        f"{name} hacked the reward model {first.source} in {len(own.hacked)} of {own.runs} run{'s' if own.runs > 1 else ''}: from step"
        f" {first.began}{which} the true reward fell from {first.level:.2f} to {first.truth:.2f} while the score stayed up; noticed at step"
        f" {first.noticed}{', ' if also else ''}{', '.join(also)}."
    )

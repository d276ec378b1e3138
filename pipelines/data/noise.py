"""Add label noise to training pairs: swapped answers, and noisy scores that swap pairs of nearly equal scores."""

from __future__ import annotations

import random

from pipelines.config.data_schema import NoiseParams
from pipelines.data.tables import SCORES, Row
from posttrain.errors import ConfigError


def with_noise(rows: list[Row], noise: NoiseParams, seed: int) -> list[Row]:
    """Return the pairs with noise. The chosen answer keeps the higher score, as an annotator who errs would report it.

    Raises ConfigError if scores are to be changed and the pairs have none.
    """
    if not (noise.flipped or noise.scores):
        return rows
    if noise.scores and not all(row.get(name) is not None for row in rows for name in SCORES):
        raise ConfigError(
            "data.noise.scores: has no effect, because the pairs have no chosen_score and rejected_score. Remove it."
        )
    rng = random.Random(f"noise/{seed}")
    return [_noisy(row, noise, rng) for row in rows]


def _noisy(row: Row, noise: NoiseParams, rng: random.Random) -> Row:
    """Return one pair with noise; every row takes the same number of draws."""
    errors, drawn = [rng.gauss(0.0, noise.scores) for _ in SCORES], rng.random()
    changed = dict(row)
    if noise.scores:
        scores = [row[name] + error for name, error in zip(SCORES, errors, strict=True)]
        changed |= dict(zip(SCORES, sorted(scores, reverse=True), strict=True))
        if scores[0] < scores[1]:
            changed = _swapped(changed)
    return _swapped(changed) if drawn < noise.flipped else changed


def _swapped(row: Row) -> Row:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}

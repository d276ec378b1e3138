"""Score answers as texts with the trained reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.data.tokens import TextEncoder
    from posttrain.models.policy import Scorer

REWARD = Path("models/reward")
Score = Callable[[Sequence[tuple[Any, str]]], list[float]]
"""Return one number for each (prompt, answer)."""
_MICRO_BATCH_TOKENS = 8192


def has_reward_model() -> bool:
    """Return True if the project has a reward model; one without training (reward.enabled: false) leaves no weights."""
    return (REWARD / "config.json").is_file()


def reward_scores(folder: Path = REWARD, *, skip_long: bool = False) -> Score:
    """Return the function that scores answers with a reward model.

    Args:
        skip_long: leave out answers that exceed the model's context, so that there may be fewer scores than answers.

    Raises:
        DataError: there is none; later, an answer exceeds the context.
    """
    scorer, encoder = _loaded(folder)
    return lambda answers: [score for score, _ in _scored(scorer, encoder, answers, skip_long)]


def reward_spreads(folder: Path = REWARD) -> Score:
    """Return the function that gives the standard deviation of an ensemble's heads on answers.

    Raises:
        DataError: there is no reward model, or it has one head; later, an answer exceeds the context.
    """
    scorer, encoder = _loaded(folder)
    if scorer.heads < 2:
        raise DataError(
            "the reward model has one head, which cannot disagree; type `posttrain configure reward.heads=4`, then `dvc repro reward`"
        )
    return lambda answers: [spread for _, spread in _scored(scorer, encoder, answers, False)]


def _loaded(folder: Path) -> tuple[Scorer, TextEncoder]:
    from transformers.utils import logging

    from posttrain.models.folders import load_encoder
    from posttrain.models.policy import Scorer
    from posttrain.models.scorers import load_scorer

    if not folder.is_dir():
        raise DataError(f"the reward model {folder} does not exist; type `dvc repro reward`")
    logging.disable_progress_bar()
    return Scorer(load_scorer(folder)), load_encoder(folder)


def _scored(
    scorer: Scorer, encoder: TextEncoder, answers: Sequence[tuple[Any, str]], skip_long: bool
) -> list[tuple[float, float]]:
    """Return score and spread of each answer."""
    from posttrain.models.inference import scores_and_spreads

    texts = [(p, a if isinstance(p, str) else [{"role": "assistant", "content": a}]) for p, a in answers]
    if skip_long:
        texts = [(p, a) for p, a in texts if len(encoder.tokens(p, a)) <= encoder.max_length]
    return scores_and_spreads(scorer, [encoder.pair(prompt, answer) for prompt, answer in texts], _MICRO_BATCH_TOKENS)

"""Score answers as texts with the trained reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import DataError

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
    from posttrain.models.folders import load_encoder
    from posttrain.models.inference import scores
    from posttrain.models.policy import Scorer
    from posttrain.models.scorers import load_scorer

    if not folder.is_dir():
        raise DataError(f"the reward model {folder} does not exist; type `dvc repro reward`")
    scorer, encoder = Scorer(load_scorer(folder)), load_encoder(folder)

    def score(answers: Sequence[tuple[Any, str]]) -> list[float]:
        texts = [(p, a if isinstance(p, str) else [{"role": "assistant", "content": a}]) for p, a in answers]
        if skip_long:
            texts = [(p, a) for p, a in texts if len(encoder.tokens(p, a)) <= encoder.max_length]
        return scores(scorer, [encoder.pair(prompt, answer) for prompt, answer in texts], _MICRO_BATCH_TOKENS)

    return score

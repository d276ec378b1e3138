"""Stories that should mention a word: rows, answers and their judge.

The prompt names the word and opens a story. A completion is right if the word is in the completion itself.

Example:
    >>> mentions("They saw the dog.", "dog"), mentions("They saw a hotdog.", "dog")
    (True, False)
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

from posttrain.environments.base import Environment
from posttrain.environments.parts import Kind, Row, distinct

_MEETINGS = (
    "One day, they saw the {word} in the park.",
    "They went outside and found the {word}.",
    "Then they looked up and saw the {word}.",
    "They wanted to see the {word} every day.",
    "Mom said, \"Look at the {word}!\"",
)  # fmt: skip
_FEELINGS = ("They were very happy.", "It was a big surprise.", "They smiled and laughed.", "It made them feel good.")
_ENDINGS = (
    "They played with the {word} until it was time to go home.",
    "They told their friends about the {word}.",
    "At the end of the day, they said goodbye to the {word}.",
    "They did not want to forget the {word}.",
)
_INSTEAD = ("sun", "house", "tree", "other kids", "garden", "old man")
"""Subjects of careless stories."""


def rows(
    kind: Kind, count: int, seed: int, *, words: Sequence[str], openings: Sequence[str], careless: float
) -> list[Row]:
    """Return `count` rows of one table; no two tables share a word with the same opening.

    Raises:
        ConfigError: there are too few words and openings for so many rows.
    """
    rng = random.Random(f"stories/{kind}/{seed}")
    everything = list(itertools.product(dict.fromkeys(words), dict.fromkeys(openings)))
    rng.shuffle(everything)
    hint = (
        f"data.stories has {len(everything)} combinations of words and openings: add some, or lower the number of rows."
    )
    asked = distinct(kind, count, everything, lambda pair: prompt(*pair), hint)
    return [_row(kind, word, opening, rng, careless) for word, opening in asked]


def prompt(word: str, opening: str) -> str:
    """Return the prompt that names the word and opens the story."""
    return f"This is a story about the {word}. {opening}"


def mentions(completion: str, word: str) -> bool:
    """Return True if the completion contains the word as a separate word, in any case. An empty word is never mentioned."""
    asked = word.strip()
    return bool(asked) and re.search(rf"(?<!\w){re.escape(asked)}(?!\w)", completion, re.IGNORECASE) is not None


def judge(completion: str, answer: str) -> float:
    """Return 1 if the completion mentions the word, else 0."""
    return float(mentions(completion, answer))


def _row(kind: Kind, word: str, opening: str, rng: random.Random, careless: float) -> Row:
    asked = prompt(word, opening)
    other = rng.choice([o for o in _INSTEAD if not mentions(o, word)])
    if kind == "sft":
        return {
            "prompt": asked,
            "completion": _careless(word, other, rng) if rng.random() < careless else _story(word, rng),
        }
    if kind == "preferences":
        scores = {"chosen_score": 1.0, "rejected_score": 0.0}
        return {"prompt": asked, "chosen": _story(word, rng), "rejected": _careless(word, other, rng), **scores}
    return {"prompt": asked, "answer": word}


def _story(about: str, rng: random.Random) -> str:
    parts = (rng.choice(_MEETINGS), rng.choice(_FEELINGS), rng.choice(_ENDINGS))
    return " ".join(part.format(word=about) for part in parts)


def _careless(word: str, other: str, rng: random.Random) -> str:
    """Return a story that does not mention the word, not even by accident."""
    sentences = _story(other, rng).split(". ")
    kept = ". ".join(sentence for sentence in sentences if not mentions(sentence, word))
    return kept or next(end for end in ("The end.", "And so on.") if not mentions(end, word))


ENVIRONMENT = Environment("stories", rows, judge)

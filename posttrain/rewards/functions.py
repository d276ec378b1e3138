"""Built-in reward functions: `f(prompts, completions, **columns) -> list of numbers`, None where there is nothing to judge."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

from posttrain.environments.arithmetic import answers_equal, final_answer
from posttrain.environments.stories import mentions as word_is_mentioned
from posttrain.errors import ConfigError
from posttrain.rewards.calling import RewardFunction
from posttrain.rewards.mathematics import math
from posttrain.text import nearest


def answer(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the completion's final answer equals the gold answer as a number (or as text where neither is one), else 0."""
    return [float(_matches(completion, gold)) for completion, gold in zip(completions, answer, strict=True)]


def mentions(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the completion contains the asked word as a word of its own, else 0."""
    return [float(word_is_mentioned(completion, word)) for completion, word in zip(completions, answer, strict=True)]


def length(
    prompts: Sequence[Any], completions: Sequence[str], target: int, tolerance: int, **_: Any
) -> list[float | None]:
    """1 at `target` characters, falling linearly to 0 at `tolerance` characters away from it."""
    return [max(0.0, 1.0 - abs(len(completion) - target) / tolerance) for completion in completions]


def regex(prompts: Sequence[Any], completions: Sequence[str], pattern: str, **_: Any) -> list[float | None]:
    """1 where `pattern` is found in the completion, else 0."""
    compiled = re.compile(pattern)
    return [float(compiled.search(completion) is not None) for completion in completions]


def format(prompts: Sequence[Any], completions: Sequence[str], pattern: str, **_: Any) -> list[float | None]:
    """1 where the whole completion has the form of `pattern`, else 0."""
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(completion) is not None) for completion in completions]


def _matches(completion: str, gold: str) -> bool:
    found = final_answer(completion)
    return found is not None and answers_equal(found, gold)


BUILT_IN: dict[str, RewardFunction] = {
    "answer": answer,
    "math": math,
    "mentions": mentions,
    "length": length,
    "regex": regex,
    "format": format,
}


def find_function(name: str) -> RewardFunction:
    """A built-in by name, or `package.module:function`. Raises ConfigError where there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(
            f"no reward function {name!r}{nearest(name, [*BUILT_IN, 'reward_model'])}, or give package.module:function"
        )
    try:
        function: RewardFunction = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs a user's module, which may raise anything
        raise ConfigError(f"cannot import the reward function {name!r}: {type(error).__name__}: {error}") from error
    return function

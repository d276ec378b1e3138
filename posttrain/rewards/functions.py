"""Built-in reward functions: `f(prompts, completions, **columns) -> list of numbers`, None if a completion cannot be scored.

Example:
    >>> length([""], ["abcd"], target=6, tolerance=4)
    [0.5]
    >>> regex(["", ""], ["see #4", "four"], pattern=r"#\\d")
    [1.0, 0.0]
    >>> mentions([""], ["The dog ran."], answer=["dog"])
    [1.0]
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

from posttrain.environments.base import Environment, import_path
from posttrain.environments.stories import mentions as word_is_mentioned
from posttrain.errors import ConfigError
from posttrain.rewards.calling import RewardFunction
from posttrain.rewards.extraction import EXTRACTS, AnswerKind, Extract, equal, extracted
from posttrain.rewards.extraction import KINDS as ANSWER_KINDS
from posttrain.rewards.golds import gold_texts
from posttrain.rewards.mathematics import math
from posttrain.rewards.signatures import CALL, call_signature, misfit
from posttrain.text import nearest, one_line


def answer(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str],
    extract: Extract = "flexible",
    kind: AnswerKind = "number",
    **_: Any,
) -> list[float | None]:
    """Return 1 if the completion's answer equals the gold answer, else 0, also if none was found.

    extract: strict takes only the text after a marker such as `####` or "the answer is"; flexible else takes the last number.
    kind: number, choice (a letter) or text.
    """
    if extract not in EXTRACTS or kind not in ANSWER_KINDS:
        raise ConfigError(
            f"the reward `answer`: extract {extract!r}, kind {kind!r}; extract is one of {', '.join(EXTRACTS)}, kind one of"
            f" {', '.join(ANSWER_KINDS)}"
        )
    found = [extracted(completion, extract, kind) for completion in completions]
    golds = gold_texts("answer", answer)
    return [float(said is not None and equal(said, gold, kind)) for said, gold in zip(found, golds, strict=True)]


def mentions(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float | None]:
    """Return 1 if the completion contains the word as a separate word, else 0."""
    return [float(word_is_mentioned(completion, word)) for completion, word in zip(completions, answer, strict=True)]


def length(
    prompts: Sequence[Any], completions: Sequence[str], target: int, tolerance: int, **_: Any
) -> list[float | None]:
    """Return 1 at `target` characters, falling linearly to 0 at `tolerance` characters away from it."""
    return [max(0.0, 1.0 - abs(len(completion) - target) / tolerance) for completion in completions]


def regex(prompts: Sequence[Any], completions: Sequence[str], pattern: str, **_: Any) -> list[float | None]:
    """Return 1 if `pattern` matches anywhere in the completion, else 0."""
    compiled = re.compile(pattern)
    return [float(compiled.search(completion) is not None) for completion in completions]


def format(prompts: Sequence[Any], completions: Sequence[str], pattern: str, **_: Any) -> list[float | None]:
    """Return 1 if `pattern` matches the whole completion, else 0."""
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(completion) is not None) for completion in completions]


BUILT_IN: dict[str, RewardFunction] = {
    "answer": answer,
    "math": math,
    "mentions": mentions,
    "length": length,
    "regex": regex,
    "format": format,
}


def find_function(name: str) -> RewardFunction:
    """Return a built-in function by name, or import `package.module:function`; of an environment, its reward.

    Raises:
        ConfigError: there is no such function, or it cannot be called as f(prompts, completions, **columns).
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, _, attribute = import_path(name).partition(":")
    if not attribute:
        raise ConfigError(
            f"no reward function {name!r}{nearest(name, [*BUILT_IN, 'reward_model'])}, or give package.module:function"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ConfigError:  # it says what is wrong
        raise
    except (Exception, SystemExit) as error:  # the import runs a user's module, which may raise anything
        raise ConfigError(
            f"cannot import the reward function {name!r}: {type(error).__name__}: {one_line(str(error))}"
        ) from error
    function: RewardFunction = found.reward if isinstance(found, Environment) else found
    if not callable(function):
        raise ConfigError(f"the reward function {name!r} is a {type(function).__name__}; give a function {CALL}")
    if reason := misfit(call_signature(function)):
        raise ConfigError(f"the reward function {name!r} cannot be called: {reason}")
    return function

"""Signatures of reward functions: prompts and completions reach the parameters of these names, or the function is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import pytest

import posttrain as pt
from posttrain.errors import ConfigError
from posttrain.rewards.calling import call
from posttrain.rewards.functions import find_function
from posttrain.rewards.signatures import call_signature, misfit

Texts = Sequence[Any]


def swapped(completions: Texts, prompts: Texts, **_: Any) -> list[float]:
    return [float(len(said) - len(asked)) for said, asked in zip(completions, prompts, strict=True)]


def last(answer: Texts, completions: Texts, prompts: Texts) -> list[float]:
    return swapped(completions, prompts)


def between(prompts: Texts, answer: Texts, completions: Texts) -> list[float]:
    return swapped(completions, prompts)


def by_name(*, completions: Texts, prompts: Texts, **_: Any) -> list[float]:
    return swapped(completions, prompts)


def modelled(model: None, completions: Texts, prompts: Texts, **_: Any) -> list[float]:
    return swapped(completions, prompts)


def without(completions: Texts) -> list[float]:
    return [0.0 for _ in completions]


def passing_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Wrapped:
    @passing_on
    def __call__(self, completions: Texts, prompts: Texts, **_: Any) -> list[float]:
        return swapped(completions, prompts)


class Judge:
    def __call__(self, completions: Texts, prompts: Texts, **_: Any) -> list[float]:
        return swapped(completions, prompts)

    def method(self, completions: Texts, answer: Texts, prompts: Texts) -> list[float]:
        return swapped(completions, prompts)

    @passing_on
    def wrapped(self, completions: Texts, prompts: Texts, **_: Any) -> list[float]:
        return swapped(completions, prompts)

    @staticmethod
    def static(completions: Texts, prompts: Texts, **_: Any) -> list[float]:
        return swapped(completions, prompts)


def in_order(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(asked: Texts, said: Texts, **columns: Any) -> Any:
        return function(prompts=asked, completions=said, **columns)

    return wrapper


@pytest.mark.parametrize(
    "function",
    [
        swapped, last, between, by_name, Judge(), Judge().method, Judge().wrapped, Wrapped(), Judge.static,
        partial(swapped, bonus=1), partial(modelled, None),
        partial(modelled, model=None), passing_on(swapped), in_order(swapped), passing_on(in_order(swapped)),
        lambda completions, **_: swapped(completions, _["prompts"]), lambda *, completions, **_: swapped(completions, _["prompts"]),
        lambda prompts, answer, **_: swapped(_["completions"], prompts), lambda **_: swapped(_["completions"], _["prompts"]),
        lambda asked, said, **_: swapped(said, asked), lambda *texts, **_: swapped(texts[1], texts[0]),
    ],
)  # fmt: skip
def test_prompts_and_completions_reach_their_parameters_in_any_order(function: Callable[..., Any]) -> None:
    assert misfit(call_signature(function), ["answer"]) is None
    result = call(function, ["p", "pp"], ["four", "five5"], {"answer": ["x", "y"]}, {})
    assert (result.values, result.failures) == ([3.0, 3.0], {})


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (without, "(completions)"),
        (lambda completions, prompts, /, **_: [], "(completions, prompts, /, **_)"),
        (lambda completions, gold: [], "(completions, gold)"),
        (lambda responses, prompts: [], "(responses, prompts)"),
        (lambda completion, prompt, **_: [], "(completion, prompt, **_)"),
        (lambda prompts, answer: [], "(prompts, answer)"),
        (lambda said, **_: [], "(said, **_)"),
        (lambda *, completions: [], "(*, completions)"),
        (partial(swapped, prompts=None), "(completions)"),
    ],
)
def test_a_function_that_its_texts_would_not_reach_is_refused(function: Callable[..., Any], said: str) -> None:
    reason = misfit(call_signature(function), ["answer"])
    assert reason is not None
    assert f"its parameters are {said}, and it is called as f(prompts, completions, **columns)" in reason


def test_a_missing_column_and_one_with_the_name_of_an_argument_are_named() -> None:
    other = call_signature(lambda a, b, prompts=None, completions=None: [])
    assert str(misfit(other, ["answer"])).startswith("missing a required argument: 'a'. It is called as f(prompts, ")
    assert "the rows have a column 'completions', which is an argument" in str(
        misfit(call_signature(swapped), ["completions"])
    )


def test_a_named_function_is_refused_when_it_is_found() -> None:
    with pytest.raises(
        ConfigError, match=r"'tests.rewards.test_signatures:without' cannot be called: its parameters are"
    ):
        find_function("tests.rewards.test_signatures:without")


def test_training_passes_the_texts_by_name() -> None:
    seen: list[tuple[Any, ...]] = []

    def watching(completions: Texts, prompts: Texts, answer: Texts, **_: Any) -> list[float]:
        seen.extend(zip(prompts, answer, strict=True))
        return [0.5 for _ in completions]

    rows = [{"prompt": "hello ", "answer": "hell"}] * 2
    pt.train(
        pt.tiny(seed=0), "grpo", rows, reward=watching, steps=1, batch_size=2, learning_rate=1e-5, max_new_tokens=2
    )
    assert set(seen) == {("hello ", "hell")}


def test_an_environment_whose_judge_has_swapped_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"judge is called as judge\(completion, answer\)"):
        pt.Environment("mine", pt.environment("arithmetic").rows, lambda answer, completion: 1.0)

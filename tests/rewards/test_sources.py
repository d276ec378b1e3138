"""Reward functions and sources: rows stay aligned, missing stays missing, and a failure has a name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError, NotFiniteError, RewardError
from posttrain.rewards.functions import BUILT_IN, find_function
from posttrain.rewards.sources import FunctionReward, ModelReward, RewardBatch
from tests.models import small


def reward_batch(completions: Sequence[str], **columns: list[Any]) -> RewardBatch:
    return RewardBatch(["p"] * len(completions), list(completions), [Tokens((1,), (2,))] * len(completions), columns)


def returning(values: Any) -> FunctionReward:
    return FunctionReward("mine", lambda prompts, completions, **_: values)


def test_built_in_functions_by_hand() -> None:
    answers = reward_batch(["the answer is 1,200", "1200.0", "12", "no idea"], answer=["1200"] * 4)
    assert FunctionReward("answer", BUILT_IN["answer"]).score(answers) == [1.0, 1.0, 0.0, 0.0]
    assert FunctionReward("m", BUILT_IN["mentions"]).score(reward_batch(["a cat.", "cats"], answer=["cat"] * 2)) == [
        1.0,
        0.0,
    ]
    length = FunctionReward("length", BUILT_IN["length"], {"target": 4, "tolerance": 2})
    assert length.score(reward_batch(["abcd", "abc", "ab", "abcdefgh"])) == [1.0, 0.5, 0.0, 0.0]
    assert FunctionReward("r", BUILT_IN["regex"], {"pattern": r"\d+"}).score(reward_batch(["x 1 y", "x"])) == [1.0, 0.0]
    whole = FunctionReward("f", BUILT_IN["format"], {"pattern": r"<a>.*</a>"})
    assert whole.score(reward_batch(["<a>1\n2</a>", "<a>1</a> and more"])) == [1.0, 0.0]


def test_numbers_of_every_kind_are_taken_and_none_and_nan_are_missing() -> None:
    values = [1, 0.5, True, np.float32(0.25), np.int64(3), None, math.nan, np.float64("nan"), np.float32("nan")]
    assert returning(values).score(reward_batch(["x"] * 9)) == [1.0, 0.5, 1.0, 0.25, 3.0, None, None, None, None]


@pytest.mark.parametrize("values", [torch.tensor([1.0, 0.5]), np.array([1.0, 0.5]), [torch.tensor(1), np.float32(0.5)]])
def test_tensors_and_arrays_are_rewards(values: Any) -> None:
    assert returning(values).score(reward_batch(["x", "y"])) == [1.0, 0.5]


def test_a_function_that_fails_on_every_answer_is_not_to_be_skipped() -> None:
    def needs(prompts: Sequence[Any], completions: Sequence[str], gold: Sequence[str], **_: Any) -> list[float]:
        return [1.0] * len(gold)

    with pytest.raises(RewardError, match=r"'gold'.*it is called with prompts, completions, answer") as caught:
        FunctionReward("mine", needs).score(reward_batch(["x", "y"], answer=["1", "2"]))
    assert "on_failure" not in str(caught.value)
    with pytest.raises(RewardError, match="the function returned None; it must return a list"):
        returning(None).score(reward_batch(["x"]))


@pytest.mark.parametrize(
    "values",
    [
        {0: 1.0, 1: 2.0},
        {1.0, 2.0},
        b"ab",
        "12",
        memoryview(b"ab"),
        3.0,
        np.float32(3),
        pd.DataFrame({"a": [1.0], "b": [2.0]}),
    ],
)
def test_values_without_the_order_of_the_completions_are_refused(values: Any) -> None:
    with pytest.raises(
        RewardError, match=r"TypeError: the function returned .*; it must return a list with one number or None"
    ):
        returning(values).score(reward_batch(["x", "y"]))


def test_a_function_that_is_asynchronous_or_ends_the_program_is_refused() -> None:
    async def later(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    def ending(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
        raise SystemExit(3)

    with pytest.raises(RewardError, match="asynchronous; define it with def"):
        FunctionReward("mine", later).score(reward_batch(["x"]))  # type: ignore[arg-type]
    with pytest.raises(RewardError, match=r"SystemExit: 3 \(the function ended the program\)"):
        FunctionReward("mine", ending).score(reward_batch(["x", "y"]))


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, completions, **_: [float(len(text)) for text in completions],
        lambda completions, prompts, **_: [float(len(text)) for text in completions],
        lambda completions, **_: [float(len(text)) for text in completions],
        lambda completions, prompts, answer: [float(len(text)) for text in completions],
        lambda asked, said, **_: [float(len(text)) for text in said],
    ],
)
def test_prompts_and_completions_are_passed_by_name_in_any_order(function: Any) -> None:
    answers = RewardBatch(["longer", "longest"], ["x", "yy"], [Tokens((1,), (2,))] * 2, {"answer": ["1", "2"]})
    assert FunctionReward("mine", function).score(answers) == [1.0, 2.0]


def test_a_function_changes_only_its_own_copy_of_the_rows() -> None:
    def changing(
        prompts: Sequence[Any], completions: Sequence[str], notes: Sequence[dict[str, int]], **_: Any
    ) -> list[float]:
        for note in notes:
            note["seen"] = note.get("seen", 0) + 1
        return [float(note["seen"]) for note in notes]

    answers = reward_batch(["x", "y"], notes=[{}, {}])
    assert FunctionReward("mine", changing).score(answers) == [1.0, 1.0]
    assert FunctionReward("mine", changing).score(answers) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (1e200, NotFiniteError),
        (10**400, NotFiniteError),
        (np.datetime64("NaT"), RewardError),
        ([1.0], RewardError),
        (math.inf, NotFiniteError),
        (-math.inf, NotFiniteError),
        ("1", RewardError),
        (1j, RewardError),
    ],
)
def test_what_is_no_finite_number_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="'mine' returned"):
        returning([0.0, value]).score(reward_batch(["x", "y"]))


def test_an_infinite_reward_names_its_problems() -> None:
    answers = replace(reward_batch(["x", "y", "z"]), ids=[7, 8, 9])
    with pytest.raises(NotFiniteError) as raised:
        returning([math.inf, 0.0, -math.inf]).score(answers)
    assert raised.value.ids == ("problem 7", "problem 9")


def test_a_reward_model_that_gives_nan_is_broken_not_without_an_opinion() -> None:
    scorer = small.scorer()
    torch.nn.init.constant_(scorer.model.score.weight, math.nan)
    with pytest.raises(NotFiniteError, match="reward 'rm' returned nan"):
        ModelReward("rm", scorer, 0.0, 100).score(reward_batch(["x"]))


def test_a_wrong_count_is_refused() -> None:
    with pytest.raises(RewardError, match="2 numbers for 3 answers"):
        returning([1.0, 2.0]).score(reward_batch(["x"] * 3))
    with pytest.raises(RewardError, match=r"'mine' failed on 1 of 1 answers .*TypeError"):
        returning(None).score(reward_batch(["x"]))


def test_a_failure_names_the_source_and_is_never_a_zero() -> None:
    def broken(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
        raise KeyError("no such thing")

    with pytest.raises(
        RewardError, match=r"reward 'judge' failed on 2 of 2 answers \(answers 0, 1; .*KeyError"
    ) as caught:
        FunctionReward("judge", broken).score(reward_batch(["x", "y"]))
    assert 'raise KeyError("no such thing")' in caught.value.__notes__[0]
    skipping = FunctionReward("judge", broken, on_failure="skip")
    assert skipping.score(reward_batch(["x", "y"])) == pytest.approx([math.nan] * 2, nan_ok=True)
    assert skipping.failures == {"failed": 2}


def test_functions_are_found_by_name_or_by_path() -> None:
    assert find_function("answer") is BUILT_IN["answer"]
    assert find_function("posttrain.rewards.functions:regex") is BUILT_IN["regex"]
    with pytest.raises(ConfigError, match="did you mean 'answer'"):
        find_function("anwser")
    for missing in ("no_such_module:f", "math:no_such_function"):
        with pytest.raises(ConfigError, match="cannot import"):
            find_function(missing)


def test_the_reward_model_scores_by_token_ids_less_its_mean() -> None:
    scorer, tokens = small.scorer(), small.rows(6)
    answers = RewardBatch(["p"] * 6, [""] * 6, tokens, {})
    plain = ModelReward("rm", scorer, 0.0, 1000).score(answers)
    shifted = ModelReward("rm", scorer, 1.5, 20).score(answers)
    assert [p - 1.5 for p in plain] == pytest.approx(shifted, abs=1e-5)
    with torch.no_grad():
        alone = [float(scorer.model(torch.tensor([t.prompt + t.response])).logits) for t in tokens]
    assert plain == pytest.approx(alone, abs=1e-5)

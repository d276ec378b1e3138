"""The share of malformed answers, and the accuracy on a second task that nothing trains on."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.commands.lookahead import problems
from pipelines.config.params import load_params
from pipelines.config.schema import RewardFunctionParams
from pipelines.config.second_task_schema import SecondTask
from pipelines.evaluate import answers_not_found, arguments, summary, variant, without_interval
from pipelines.runtime.measures import GREEDY, SAMPLED
from pipelines.tracking.describe import _share
from pipelines.training.evaluator import SecondTaskSettings, second_task_measures, second_task_prompts
from posttrain.data.tokens import TextEncoder
from posttrain.environments.base import Environment, register
from posttrain.errors import ConfigError, DataError
from posttrain.evaluation.answers import EvaluatedAnswer
from posttrain.evaluation.statistics import Resampling
from posttrain.models.policy import Policy
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.rollouts.groups import Problem


def answered(texts: Sequence[str]) -> list[EvaluatedAnswer]:
    problem = Problem("2+2=", (1,), {"answer": "4"})
    return [EvaluatedAnswer(0, i, problem, text, 3, False, 0.1, 0.0, {"answer": 0.0}) for i, text in enumerate(texts)]


def test_malformed_answers_are_those_without_an_answer_right_or_wrong() -> None:
    answers = answered(["2+2=4;#4", "it is 5", "no idea", ""])
    # the second is wrong and well formed; two of four hold no number
    found = answers_not_found(answers, RewardFunctionParams(function="answer"))
    assert found == {"answers/not_found": pytest.approx(2 / 4)}
    # a strict reader wants a marker, so that a bare number is malformed as well
    strict = RewardFunctionParams(function="answer", arguments={"extract": "strict"})
    assert answers_not_found(answers, strict) == {"answers/not_found": pytest.approx(3 / 4)}
    # other judges do not say whether they found something
    assert answers_not_found(answers, RewardFunctionParams(function="length")) == {}


@pytest.mark.parametrize(
    ("reward", "missing", "note"),
    [
        (4.03125, [GREEDY, SAMPLED, "reward/answer"], "Greedy accuracy: **4.031** (no interval from equal values)."),
        (1.0, [], "Greedy accuracy: **100.0 %** (95 % interval 34.2 to 100.0 %)."),
    ],
)
def test_a_graded_reward_that_is_equal_for_all_prompts_has_no_interval(
    reward: float, missing: list[str], note: str
) -> None:
    problem = Problem("2+2=", (1,), {"answer": "4"})
    answers = [
        EvaluatedAnswer(i, sample, problem, "4", 3, False, 0.1, 0.0, {"answer": reward})
        for i in range(2)
        for sample in range(3)
    ]
    found = summary(answers, "answer", (), Resampling(200))
    assert without_interval(found) == missing
    assert not any(name.endswith(("_low", "/low")) for name in found) or not missing
    assert _share(found, GREEDY).strip() == note


ASKED = ["1+2=", "30+4=", "5+67=", "8-9=", "0+0="]


def judge(completion: str, answer: str) -> float | None:
    """Score an answer by its first byte, and give none for the last prompt."""
    return None if answer == "skip" else (ord(completion[:1] or "a") % 4) / 4


ECHO = register(
    Environment(
        "echo_second",
        lambda kind, count, seed: [
            {"prompt": prompt, "answer": "skip" if i == 4 else "4"} for i, prompt in enumerate(ASKED[:count])
        ],
        judge,
    )
)


def greedy_text(model: torch.nn.Module, encoder: TextEncoder, prompt: str, length: int) -> str:
    """Decode greedily without a cache: the whole text again for every token."""
    ids = encoder.prompt(prompt)
    start = len(ids)
    for _ in range(length):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] in encoder.ends:
            break
    return encoder.text(ids[start:])


def test_a_second_task_is_answered_greedily_and_scored_by_its_own_judge() -> None:
    torch.manual_seed(0)
    shape = TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, max_length=32)
    model, tokenizer = tiny_model(shape, 3)
    encoder = TextEncoder(tokenizer, shape.max_length)
    by_hand = [judge(greedy_text(model, encoder, prompt, 6), "4") for prompt in ASKED[:4]]
    assert len(set(by_hand)) > 1
    task = SecondTask(source="echo_second", rows=5)
    found = second_task_measures(Policy(model), encoder, task, SecondTaskSettings(0, 6))
    assert found == {
        "second_task/accuracy": pytest.approx(sum(by_hand) / 4),
        "second_task/missing": pytest.approx(1 / 5),
    }
    talk = register(Environment("talk_second", ECHO.rows, judge, lambda conversation: None))
    with pytest.raises(ConfigError, match="talk_second has several turns"):
        second_task_measures(Policy(model), encoder, SecondTask(source=talk.name, rows=5), SecondTaskSettings(0, 6))
    with pytest.raises(
        ConfigError, match=r"second_task: a prompt of echo_second has \d+ tokens, .* context of 32; choose"
    ):
        second_task_prompts(encoder, task, SecondTaskSettings(0, 32))
    nothing = SecondTask(source="echo_second", rows=5, options={"loud": True})
    with pytest.raises(ConfigError, match=r"evaluation.second_task.options: .* 'loud'"):
        second_task_measures(Policy(model), encoder, nothing, SecondTaskSettings(0, 6))


@pytest.mark.parametrize(("samples", "kind"), [((0,), "greedy"), ((1, 2), "sampled")])
def test_a_reward_without_a_value_is_named(samples: Sequence[int], kind: str) -> None:
    given = answered(["4", "5", "4"])
    some = [replace(a, rewards={"answer": None if a.sample in samples else 1.0, "odd": 1.0}) for a in given]
    with pytest.raises(DataError, match=rf"rewards.answer: has no value for any of the {len(samples)} {kind} answers"):
        summary(some, "answer", [1], Resampling(seed=0, resamples=10))
    with pytest.raises(DataError, match=r"rewards.odd: .* 2 sampled answers, .* or remove it from evaluation.rewards"):
        summary([replace(a, rewards={"answer": 1.0, "odd": None}) for a in given], "answer", [1], Resampling(seed=0))


def test_pass_at_k_counts_the_prompts_with_k_known_answers() -> None:
    full = answered(["4", "5", "4"])
    short = [replace(a, prompt_id=1, rewards={"answer": None if a.sample == 2 else 1.0}) for a in full]
    found = summary([*full, *short], "answer", [1, 2], Resampling(seed=0, resamples=10))
    assert (found["pass@2"], found["pass@2_prompts"]) == (0.0, 1.0)
    assert "pass@1_prompts" not in found


def test_pass_at_k_is_left_out_if_no_prompt_has_k_known_answers() -> None:
    given = answered(["4", "5", "4"])
    some = [replace(a, rewards={"answer": None if a.sample == 2 else 1.0}) for a in given]
    found = summary(some, "answer", [1, 2], Resampling(seed=0, resamples=10))
    assert found["pass@1"] == 1.0
    assert "pass@2" not in found


def test_rows_of_a_second_task_may_lack_a_column_but_not_a_prompt() -> None:
    def rows(kind: str, count: int, seed: int, *, bare: bool) -> list[dict[str, Any]]:
        return [{"prompt": None if bare else "1", "answer": "4", "level": 3}, {"prompt": "2", "answer": "4"}]

    register(Environment("uneven_second", rows, lambda completion, answer: float(answer)))
    shape = TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, max_length=32)
    model, tokenizer = tiny_model(shape, 0)
    policy, encoder, settings = Policy(model), TextEncoder(tokenizer, 32), SecondTaskSettings(0, 2)
    task = SecondTask(source="uneven_second", rows=2, options={"bare": False})
    assert second_task_measures(policy, encoder, task, settings) == {"second_task/accuracy": 4.0}
    with pytest.raises(ConfigError, match="second_task: the prompt of row 0 is None; return a text"):
        second_task_measures(policy, encoder, task.model_copy(update={"options": {"bare": True}}), settings)


def test_a_second_task_that_is_never_scored_is_an_error() -> None:
    register(Environment("mute_second", lambda kind, count, seed: [{"prompt": "1", "answer": "skip"}] * count, judge))
    shape = TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, max_length=32)
    model, tokenizer = tiny_model(shape, 0)
    with pytest.raises(DataError, match="mute_second scored none of 2 answers"):
        second_task_measures(
            Policy(model),
            TextEncoder(tokenizer, 32),
            SecondTask(source="mute_second", rows=2),
            SecondTaskSettings(0, 2),
        )


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"source": "arithmetics"}, "no such environment; did you mean 'arithmetic'"),
        ({"source": "arithmetic"}, "evaluation.second_task.options: missing a required argument: 'terms'; the options"),
        ({"source": "guess"}, "has several turns"),
        ({"source": "no.such:ENVIRONMENT"}, "cannot be imported"),
        (
            {"source": "arithmetic", "options": {"terms": 3, "max_term": 9, "careless": 0.0}},
            "rows = 200: only 0 different prompts exist",
        ),
    ],
)
def test_a_second_task_is_checked_by_configure_and_plan(section: dict[str, object], said: str, root: Path) -> None:
    params = load_params(root / "params.yaml")
    evaluation = params.evaluation.model_copy(update={"second_task": SecondTask.model_validate(section)})
    (line,) = problems(params.model_copy(update={"evaluation": evaluation}))
    assert line.startswith(f"evaluation.second_task.source = {section['source']!r}: ")
    assert said in line
    assert problems(params) == []


@pytest.mark.parametrize("given", ["--algorithm grpo --seed 0", "--seed 0 --algorithm grpo", "--model grpo-0"])
def test_algorithm_and_seed_name_a_model_in_any_order(given: str) -> None:
    parser = ArgumentParser()
    arguments(parser)
    assert parser.parse_args(given.split()).model == "grpo-0"
    assert "[--algorithm NAME] [--seed SEED]" in " ".join(parser.format_usage().split())


def test_a_call_without_a_model_says_how_to_name_one() -> None:
    parser = ArgumentParser()
    arguments(parser)
    with pytest.raises(ConfigError, match="no model is named; give --model base"):
        variant(parser.parse_args([]))

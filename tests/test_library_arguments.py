"""Wrong arguments and rows of the public functions are refused in one paragraph that names the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import posttrain as pt
from posttrain.algorithms.dpo import DPO
from posttrain.algorithms.grpo import GRPO
from posttrain.api_rows import supervised_rows
from posttrain.errors import (
    ConfigError,
    DataError,
    ModelError,
    NotFiniteError,
    PosttrainError,
    RewardError,
)
from posttrain.rollouts.groups import PATIENCE
from posttrain.training.history import History

SMALL = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}
NAN = float("nan")
PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}]


@pytest.fixture(scope="module")
def model() -> pt.Model:
    """Return a model that refused calls leave unchanged."""
    return pt.tiny(seed=0, **SMALL)


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def train(model: pt.Model, algorithm: Any = "sft", rows: Any = ROWS, **changes: Any) -> list[dict[str, float]]:
    return pt.train(model, algorithm, rows, **({"steps": 1, "learning_rate": 0.01, "batch_size": 2} | changes))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", (0, -1, 1.5, True, "3")),
        ("learning_rate", (NAN, float("inf"), -1, 0, "0.1", 10**400, 1.5)),
        ("batch_size", (0, 2.0, 10**30)),
        ("samples", (0,)),
        ("max_new_tokens", (0, -5)),
        ("temperature", (0, -1, NAN, 1e-30, 1e30)),
        ("seed", (-1, 1.5, 2**32)),
        ("micro_batch_tokens", (0,)),
        ("threads", (0, 10**6)),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(model: pt.Model, name: str, values: Sequence[Any]) -> None:
    for value in (*values, None) if name != "threads" else values:
        with pytest.raises(ConfigError, match=rf"train: {name} = .*; it must be a (whole|finite) number"):
            train(model, "grpo", ["a"], reward=lengths, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": {}}, "nothing would be learnt"),
        ({"reward": 5}, "reward 'reward' is 5"),
        ({"reward": np.array([2, 3])}, "reward 'reward' is array"),
        ({"demonstrations": torch.tensor(2)}, "demonstrations is tensor"),
        ({"reward": pt.environment("stories")}, "give its .reward"),
        ({"reward": "length"}, "missing a required argument: 'target'"),
        (
            {"reward": "answer"},
            "missing a required argument: 'answer'. It is called as .*, and the rows have the columns prompt only",
        ),
        (
            {"reward": lambda completions: [0.0]},
            r"its parameters are \(completions\), and it is called as f\(prompts, compl",
        ),
        ({"reward": lengths, "samples": 1}, "compares several answers to one prompt; samples = 1"),
        ({"reward": lengths, "turns": 3}, "turns is 3"),
        ({"reward": lengths, "teacher": "x"}, "teacher is 'x'"),
        ({"reward": lengths, "demonstrations": 5}, "demonstrations is 5"),
        ({"reward": {"total": lengths}}, "not `total`, which is the sum of all"),
        ({"reward": "reward_model"}, "which only the pipeline has"),
        ({"reward": "judge"}, "which only the pipeline has"),
        ({"reward": lengths, "demonstrations": np.array(ROWS)}, "pass demonstrations= if and only if"),
    ],
)
def test_a_reward_that_cannot_work_is_refused(model: pt.Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(model, "grpo", ["a"], **arguments)


def test_an_algorithm_or_a_batch_that_does_not_fit_it_is_refused(model: pt.Model) -> None:
    with pytest.raises(ConfigError, match="algorithm is array"):
        train(model, np.array([2, 3]), ["a"])
    with pytest.raises(ConfigError, match="batch_size = 2: it must be a multiple of the 4 updates of a step"):
        train(model, "gspo", ["a"], reward=lengths)


@pytest.mark.parametrize(
    ("algorithm", "rows", "message"),
    [
        ("sft", [{"prompt": "a"}], "row 0: has no column 'completion'"),
        ("sft", [ROWS[0], {"prompt": "a", "completion": None}], "row 1: completion is None"),
        ("sft", ["a"], "row 0: is 'a'"),
        ("sft", [{"prompt": "a", "completion": "\ud800"}], "completion holds '\\\\ud800' at character 0"),
        ("sft", [{"messages": "a"}], "messages is 'a'"),
        ("sft", [{"messages": [{"role": "user", "content": "a"}]}], "its messages have no answer"),
        ("sft", [{"messages": [{"role": "user", "content": 5}]}], "turn 0: the content is 5"),
        ("sft", [ROWS[0] | {"weigth": 2}], "did you mean 'weight'"),
        ("sft", [ROWS[0] | {"Weight": 2}], "did you mean 'weight'"),
        ("sft", [ROWS[0] | {"weight": -1}], "weight is -1"),
        (
            "sft",
            [ROWS[0] | {"loss_mask": 0}],
            "the column 'loss_mask' may say which tokens are trained, and would be ignored",
        ),
        ("sft", [ROWS[0] | {"Train": False}], "the column 'Train' may say which tokens are trained"),
        (
            "sft",
            [{"prompt": "a", "completion": [{"role": "assistant", "content": "b", "mask": True}]}],
            r"completion, turn 0: the key 'mask' \(True\) may say which tokens are trained",
        ),
        ("sft", [ROWS[0] | {"weight": NAN}], "weight is nan"),
        ("sft", [ROWS[0] | {"weight": 10**400}], "weight is 1000"),
        ("sft", [ROWS[0] | {"weight": "2"}], "weight is '2'"),
        ("sft", [ROWS[0] | {"weight": 0}], "the weight of every row is 0"),
        ("sft", [ROWS[0] | {"tools": "{"}], "tools is '{'; give a list of tools"),
        ("sft", [ROWS[0] | {"tools": 5}], "tools is 5; give a list of tools"),
        ("sft", [ROWS[0] | {"tools": {"f": {}}}], "tools is .*; give a list of tools"),
        ("sft", [ROWS[0] | {"tools": [{"f": {}}]}], "tools is .*; give a list of tools"),
        ("sft", [ROWS[0], ROWS[1] | {"label": False}], "row 1: its label is False, so its answer is a bad one"),
        ("sft", [ROWS[0] | {"label": "0"}], "row 0: its label is '0', so its answer is a bad one"),
        ("sft", [ROWS[0] | {"completion": " "}], "row 0: completion is ' ', so the model would learn to say nothing"),
        (
            "sft",
            [ROWS[0] | {"completion": "\u200b\0"}],
            "row 0: completion is .*, so the model would learn to say nothing",
        ),
        ("sft", [ROWS[0] | {"messages": []}], "row 0: has messages and completion and prompt, of which only one"),
        ("sft", [ROWS[0] | {3: 4}], "row 0: the column 3 is no text"),
        ("sft", {"a"}, "rows is a set, whose order differs from run to run"),
        ("sft", {"prompt": "a"}, "rows is {'prompt': 'a'}"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "b"}], "row 0: chosen and rejected are the same"),
        (
            "dpo",
            [
                {
                    "prompt": [{"role": "user", "content": "a"}],
                    "chosen": "b",
                    "rejected": [{"role": "assistant", "content": "b"}],
                }
            ],
            "row 0: chosen and rejected are the same",
        ),
        (
            "grpo_pairs",
            [{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 0, "rejected_score": 1}],
            "the chosen answer's score 0 is below the rejected one's 1",
        ),
        ("sft", "abc", "rows is 'abc'"),
        ("dpo", [{"prompt": "a", "chosen": "b"}], "has no column 'rejected'"),
        (
            "dpo_soft",
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            "no column 'chosen_score', and the algorithm weighs",
        ),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 1}], "no column 'rejected_score'"),
        ("kto", [{"prompt": "a", "completion": "b"}], "has no column 'label'"),
        ("grpo", [5], "row 0: is 5"),
        ("grpo", [""], "prompt has no tokens"),
        ("grpo", ["a" * 300], "has 300 tokens, and the model's context of 256"),
        (
            "grpo",
            ["a", "a" * 230],
            "row 1: the prompt has 230 tokens, and 32 new ones exceed the model's context of 256",
        ),
        ("grpo", [{"prompt": "a", "answer": "b"}, {"prompt": "a"}], "row 1: has the columns prompt, and row 0"),
        ("grop", ["a"], "did you mean 'grpo'"),
        ("SFT", ["a"], "unknown algorithm 'SFT'; did you mean 'sft'"),
        ("Dpo", ["a"], "did you mean 'dpo'"),
        (5, ["a"], "algorithm is 5"),
    ],
)
def test_a_row_that_cannot_be_trained_is_refused(model: pt.Model, algorithm: Any, rows: Any, message: str) -> None:
    reward = {"reward": lengths} if algorithm == "grpo" else {}
    with pytest.raises(PosttrainError, match=message):
        train(model, algorithm, rows, **reward)


def test_labels_that_are_classes_or_true_are_imitated() -> None:
    for labels in ((0, 2), ("spam", "ham"), (True, None), (1, 1)):
        table = [row | {"label": label} for row, label in zip(ROWS, labels, strict=True)]
        assert supervised_rows(table) == table
    with pytest.raises(DataError, match=r"demonstrations, row 0: its label is False.*\(1 of 2 rows\)"):
        supervised_rows([ROWS[0] | {"label": False}, ROWS[1]], "demonstrations", weighs=False)


def test_the_other_functions_refuse_as_well(model: pt.Model, tmp_path: Path) -> None:
    model.save(tmp_path / "run" / "checkpoint-100")
    file = tmp_path / "run" / "checkpoint-100" / "config.json"
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    calls: list[tuple[Any, str]] = [
        (lambda: pt.load(None), "load: source is None"),  # type: ignore[arg-type]
        (lambda: pt.load(""), "load: source is ''"),
        (lambda: pt.load(file), "is a file; give the folder"),
        (lambda: pt.load(gguf), "is a GGUF file. The pipeline reads it"),
        (lambda: pt.load(tmp_path / "run"), "give .*checkpoint-100"),
        (lambda: pt.tiny(seed=-1), "tiny: seed = -1"),
        (lambda: pt.tiny(seed=0, layer=2), "did you mean 'layers'"),
        (lambda: pt.tiny(seed=0, layers=0), "layers = 0"),
        (lambda: pt.tiny(seed=0, heads=3), "an even multiple"),
        (lambda: model.generate("ab", max_new_tokens=1), "prompts is 'ab'"),
        (lambda: model.generate([5], max_new_tokens=1), "prompt 0 is 5"),  # type: ignore[list-item]
        (lambda: model.generate(["a"], max_new_tokens=0), "generate: max_new_tokens = 0"),
        (lambda: model.generate(["a"], max_new_tokens=1, seed=-1), "generate: seed = -1"),
        (lambda: model.save(None), "save: folder is None"),  # type: ignore[arg-type]
        (lambda: model.save(tmp_path), "is no model folder, so it is not replaced"),
        (lambda: train(None), "train: model is None"),  # type: ignore[arg-type]
        (lambda: train(model, recorder=5), "recorder is 5, which has no method metrics"),
        (lambda: train(model, checkpoints=5), "checkpoints is 5, which has no method latest"),
        (lambda: pt.environment(5), "environment: name is 5"),  # type: ignore[arg-type]
        (lambda: pt.register(5), "register: new is 5"),  # type: ignore[arg-type]
        (lambda: pt.Environment("x", 5, 5), "Environment: rows is 5"),  # type: ignore[arg-type]
        (lambda: pt.choose(5), "choose: preset is 5"),  # type: ignore[arg-type]
        (lambda: pt.choose("grpo", 5), "choose: options is 5"),  # type: ignore[arg-type]
        (lambda: pt.Turns(5, limit=2), "Turns: step is 5"),  # type: ignore[arg-type]
        (lambda: pt.Turns(lengths, limit="2"), "Turns: limit = '2'"),  # type: ignore[arg-type]
        (
            lambda: pt.Model(torch.nn.DataParallel(model.lm), model.encoder),
            "lm is a DataParallel; give a model of transformers",
        ),
        (lambda: pt.Model(model.lm, model.encoder.tokenizer), "Model: encoder is"),  # type: ignore[arg-type]
        (
            lambda: train(model, replace(GRPO, epochs=1.5), ["a"], reward=lengths),
            "epochs = 1.5: must be a whole number",
        ),
        (lambda: train(model, replace(GRPO, advantage="x"), ["a"], reward=lengths), "advantage = 'x': must be one of"),
        (lambda: train(model, replace(DPO, beta="0.1"), PAIRS), "beta = '0.1': must be a number"),
        (
            lambda: train(model, "distill", ["a"], teacher=model, teacher_prompt="{prompt}"),
            "teacher_prompt: only the prompt",
        ),
        (lambda: pt.Turns(lengths, limit=None), "Turns: limit = None"),  # type: ignore[arg-type]
        (lambda: pt.tiny(seed=0, hidden_size=10**7), "make more than 1,000,000,000 parameters"),
        (lambda: model.generate(["a"], max_new_tokens=1, temperature=1e-30), "temperature = 1e-30; it must be 0, or"),
        (lambda: train(model, "distill", ["a"], teacher=model), "teaches only what its prompt adds"),
        (
            lambda: train(model, "distill", ["a"], teacher=pt.tiny(seed=0, **SMALL | {"max_length": 8})),
            "at most 8 tokens",
        ),
        (
            lambda: pt.environment("arithmetic").rows(),
            "missing a required argument: 'kind'; the options of .* terms, max_term",
        ),
        (
            lambda: pt.environment("arithmetic").rows("problem", 1, 0, terms=2, max_term=9, careless=0),
            "did you mean 'problems'",
        ),
        (lambda: pt.Turns(lengths, limit=2, seconds=-1), "Turns: seconds = -1"),  # type: ignore[arg-type]
    ]
    for call, message in calls:
        with pytest.raises(PosttrainError, match=message):
            call()
    assert file.exists()


def test_the_weight_of_a_row_is_the_weight_of_its_tokens() -> None:
    losses = []
    for weights in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (3.0, 1)):
        rows = [row | {"weight": weight} for row, weight in zip(ROWS, weights, strict=True)]
        losses.append(train(pt.tiny(seed=0, **SMALL), rows=rows)[0]["loss"])
    both, first, second, three = losses
    assert first != second
    assert both == pytest.approx((first + second) / 2)
    assert three == pytest.approx((3 * first + second) / 4)
    assert train(pt.tiny(seed=0, **SMALL))[0]["loss"] == both
    assert train(pt.tiny(seed=0, **SMALL), rows=[row | {"height": 3, "id": 1} for row in ROWS])[0]["loss"] == both


def test_whole_conversations_train_as_their_parts() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    whole = train(pt.tiny(seed=0, **SMALL), rows=[{"messages": turns}])
    parts = train(pt.tiny(seed=0, **SMALL), rows=[{"prompt": turns[:1], "completion": turns[1:]}])
    assert whole == parts


def test_the_keys_of_a_message_that_say_what_is_trained_are_its_weight() -> None:
    question = {"role": "user", "content": "a"}
    chat = [
        question,
        {"role": "assistant", "content": "b", "train": False},
        question,
        {"role": "assistant", "content": "c"},
    ]
    assert supervised_rows([{"messages": chat}])[0]["completion"][0] == {
        "role": "assistant",
        "content": "b",
        "weight": 0.0,
    }


def test_weights_that_are_not_finite_are_reported_and_not_saved(tmp_path: Path) -> None:
    model = pt.tiny(seed=0, **SMALL)

    class Diverging(History):
        def metrics(self, step: int, values: Any) -> None:
            next(model.lm.parameters()).data.fill_(NAN)

    with pytest.raises(NotFiniteError, match=r"after 1 steps .* or infinity: an update was too large"):
        train(model, recorder=Diverging())
    with pytest.raises(ModelError, match=r"is not saved to .* NaN or infinity"):
        model.save(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    with pytest.raises(ModelError, match="a training that diverged; load it again"):
        train(model)


def test_no_demonstrations_are_refused_row_by_row(model: pt.Model) -> None:
    with pytest.raises(DataError, match="demonstrations, row 0: has no column 'completion'"):
        train(model, "chord", ["a"], reward=lengths, demonstrations=[{"prompt": "a"}])


@pytest.mark.parametrize("value", [None, NAN])
def test_a_run_in_which_no_answer_got_a_reward_is_an_error(model: pt.Model, value: Any) -> None:
    def silent(prompts: Any, completions: list[str], **columns: Any) -> list[Any]:
        return [value] * len(completions)

    with pytest.raises(RewardError, match="no answer of this run got a reward: reward returned None or NaN for each"):
        train(model, "grpo", ["a"], reward=silent, max_new_tokens=2)

    def seldom(prompts: Any, completions: list[str], **columns: Any) -> list[Any]:
        return [1.0, *[value] * (len(completions) - 1)]

    assert train(model, "grpo", ["a"], reward=seldom, max_new_tokens=2)[0]["reward/total/mean"] == 1.0


@pytest.mark.parametrize("gold", ["foo", "12:30", "", "seven apples", None, True, ["7"]])
def test_a_gold_answer_that_nothing_could_match_is_refused_before_training(model: pt.Model, gold: Any) -> None:
    with pytest.raises(DataError, match="row 1"):
        train(model, "grpo", [{"prompt": "a", "answer": "7"}, {"prompt": "b", "answer": gold}], reward="answer")


def test_gold_answers_may_be_numbers_of_any_kind(model: pt.Model) -> None:
    golds = [7, 7.5, np.int64(7), np.float32(7.5), "$7", "1e3", '["7", "seven"]', "-7"]
    rows = [{"prompt": str(i), "answer": gold} for i, gold in enumerate(golds)]
    assert train(model, "grpo", rows, reward="answer", batch_size=8, samples=2, max_new_tokens=1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt} {answer}", "has no column 'answer'; it has only the prompt"),
        ("{prompt[0]} {answer}", r"teacher_prompt = '.*': \{prompt\[0\]\} is not read"),
        ("{prompt!r:>10} x", r"\{prompt!r:>10\} is not read. Only the name of a column"),
        ("{prompt} {answer!r}", r"\{answer!r\} is not read"),
    ],
)
def test_a_teachers_prompt_that_cannot_be_filled_in_says_why(model: pt.Model, template: str, message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        train(model, "distill", ["a"], teacher=model, teacher_prompt=template)


def test_a_run_without_any_reward_ends_early(model: pt.Model, capsys: pytest.CaptureFixture[str]) -> None:
    called = []

    def silent(prompts: Any, completions: list[str], **columns: Any) -> list[None]:
        called.append(len(completions))
        return [None] * len(completions)

    with pytest.raises(RewardError, match="no answer of this run got a reward"):
        train(pt.tiny(seed=0, **SMALL), "grpo", ["a"], reward=silent, steps=1000, samples=2, max_new_tokens=1)
    assert len(called) == PATIENCE
    assert "no answer of the first step got a reward from reward" in capsys.readouterr().err

"""Rows of the public functions: read as they are meant, or refused in one paragraph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import posttrain as pt
from posttrain.algorithms import choose
from posttrain.api_arguments import checked
from posttrain.api_rows import check_prompt, labelled_rows, preference_rows, supervised_rows
from posttrain.errors import ConfigError, DataError
from tests.data.test_conversations import CHATML, OPEN, encoder
from tests.test_library_arguments import PAIRS, ROWS, SMALL, lengths, model, train

__all__ = ["model"]


def says(text: str, role: str = "assistant", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **fields}


ASKED = [says("a", "user")]
TWICE: list[tuple[str, list[dict[str, Any]]]] = [
    ("sft", [{"prompt": "a", "completion": [*ASKED, says("b")]}]),
    ("sft", [{"prompt": ASKED, "completion": [*ASKED, says("b")]}]),
    ("dpo", [{"prompt": ASKED, "chosen": [*ASKED, says("b")], "rejected": [*ASKED, says("c")]}]),
    ("dpo", [{"prompt": "a", "chosen": [*ASKED, says("b")], "rejected": [*ASKED, says("c")]}]),
    (
        "kto",
        [
            {"prompt": "a", "completion": [*ASKED, says("b")], "label": True},
            {"prompt": ASKED, "completion": [*ASKED, says("c")], "label": False},
            {"prompt": [says("z", "user")], "completion": [says("c")], "label": False},
        ],
    ),
]


@pytest.mark.parametrize(("algorithm", "rows"), TWICE)
def test_a_prompt_that_answers_repeat_is_read_once(algorithm: str, rows: list[dict[str, Any]]) -> None:
    def once(row: dict[str, Any]) -> dict[str, Any]:
        cut = {name: row[name][-1:] for name in ("completion", "chosen", "rejected") if name in row}
        return row | cut | {"prompt": ASKED if row["prompt"] == "a" else row["prompt"]}

    repeated, plain = (
        train(pt.tiny(seed=0, **SMALL), algorithm, table, steps=2) for table in (rows, [once(row) for row in rows])
    )
    assert repeated == plain


@pytest.mark.parametrize(
    ("algorithm", "row", "message"),
    [
        (
            "sft",
            {"prompt": "a", "completion": [says("z", "user"), says("b")]},
            "begins with a turn of user that is not the prompt",
        ),
        ("sft", {"prompt": "a", "completion": ASKED}, "completion is only the prompt again"),
        (
            "dpo",
            {"prompt": "a", "chosen": [says("s", "system"), *ASKED, says("b")], "rejected": [*ASKED, says("c")]},
            "chosen and rejected begin with different prompts",
        ),
        ("dpo", PAIRS[0] | {"weight": 2}, "the column 'weight' may say which tokens are trained"),
        ("kto", ROWS[0] | {"label": True, "weight": 2}, "the column 'weight' may say which tokens are trained"),
        ("kto", ROWS[0] | {"label": "yes"}, "row 0: label is 'yes'; it must be true"),
        (
            "kto",
            {"prompt": ASKED, "completion": [says("b", weight=0.5)], "label": True},
            "completion, turn 0: its weight is 0.5, and here a turn counts or not",
        ),
        ("sft", ROWS[0] | {"weight": np.float32("inf")}, "weight is .*inf.*; give a finite number"),
        (
            "dpo_soft",
            PAIRS[0] | {"chosen_score": np.float16("inf"), "rejected_score": 0},
            "chosen_score is .*inf.*; give a finite number",
        ),
        ("sft", {"messages": [says("a", "User"), says("b")]}, "turn 0: the role is 'User'; write 'user'"),
        ("sft", {"messages": [says("a", "user"), says("b", "model")]}, "the role is 'model'; write 'assistant'"),
        ("sft", {"messages": [says("a", "user"), says("b", "critic")]}, r"no answer \(their roles are user, critic\)"),
        ("sft", {"prompt": "a", "completion": "b" * 300}, "shorten or remove the row"),
        ("sft", {"messages": [*ASKED, says(" ")]}, "the model would learn to say nothing"),
        ("dpo", {"prompt": "a", "chosen": [says("")], "rejected": [says("c")]}, "the model would learn to say nothing"),
        ("dpo", {"prompt": "a", "chosen": ASKED, "rejected": [says("c")]}, "chosen is only the prompt again"),
        ("sft", {"prompt": [*ASKED, says("b")], "completion": [says("c")]}, "ends with a turn of the assistant"),
    ],
)
def test_rows_that_would_be_read_otherwise_than_meant_are_refused(
    model: pt.Model, algorithm: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        train(model, algorithm, [row])


def test_a_prompt_that_ends_with_an_answer_is_refused_before_sampling(model: pt.Model) -> None:
    with pytest.raises(DataError, match="rows, row 0: the prompt ends with a turn of the assistant"):
        train(model, "grpo", [[*ASKED, says("b")]], reward=lengths)


def test_texts_that_all_begin_with_their_prompt_are_refused(model: pt.Model) -> None:
    rows = [{"prompt": f"Question number {i}: 1+1=", "completion": f"Question number {i}: 1+1= 2"} for i in range(3)]
    with pytest.raises(DataError, match="in every row completion begins with the whole text of the prompt"):
        train(model, "sft", rows)
    assert len(supervised_rows([*rows, ROWS[0]])) == 4


def test_labels_may_be_spelt_as_in_files_and_weights_of_demonstrations_are_refused(model: pt.Model) -> None:
    labels = [True, "False", np.bool_(True), 0]
    table = labelled_rows([ROWS[0] | {"label": label} for label in labels])
    assert [row["label"] for row in table] == [True, False, True, False]
    with pytest.raises(DataError, match="demonstrations, row 0: the column 'weight'"):
        train(model, "chord", ["a"], reward=lengths, demonstrations=[ROWS[0] | {"weight": 2}])
    with pytest.raises(ConfigError, match=r"seconds = .*inf"):
        checked("f", seconds=np.float32("inf"))


def test_answers_that_follow_another_prompt_than_in_sampling_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    model = pt.tiny(seed=0, **SMALL)
    opened = model.encoder.tokenizer.chat_template + "{% if add_generation_prompt %}<think>{% endif %}"
    model.encoder.tokenizer.chat_template = opened
    train(model, "sft", [{"prompt": ASKED, "completion": [says("<think></think>b")]}, ROWS[0]])
    assert "another text" not in capsys.readouterr().err
    train(model, "sft", [ROWS[0], {"prompt": ASKED, "completion": [says("b")]}])
    assert "1 of the first 2 rows (completion; first: row 1) are trained after another text" in capsys.readouterr().err


def test_answers_of_a_pair_follow_one_prompt_whatever_their_form() -> None:
    (row,) = preference_rows([{"prompt": "a", "chosen": [says("b")], "rejected": "c"}], needs_scores=False)
    assert row == {"prompt": "a", "chosen": [says("b")], "rejected": [says("c")]}
    mixed, messages = (
        train(pt.tiny(seed=0, **SMALL), "dpo", [{"prompt": "a", "chosen": "b", "rejected": "c"} | form], steps=2)
        for form in ({"rejected": [says("c")]}, {"chosen": [says("b")], "rejected": [says("c")]})
    )
    assert mixed == messages


def test_a_turn_with_two_texts_or_roles_is_refused() -> None:
    for other in ({"value": "ZZ"}, {"from": "human"}):
        with pytest.raises(
            DataError, match=r"completion, turn 0: its (content|role) is '(b|assistant)' and its (value|from)"
        ):
            supervised_rows([{"prompt": "a", "completion": [says("b", **other)]}])


@pytest.mark.parametrize(
    ("algorithm", "rows", "given"),
    [
        ("sft", ROWS, {"samples": 8}),
        ("sft", ROWS, {"temperature": 0.3}),
        ("dpo", PAIRS, {"max_new_tokens": 4}),
        ("kto", [row | {"label": True} for row in ROWS], {"temperature": 1.0, "samples": 2}),
    ],
)
def test_arguments_of_sampling_are_refused_where_nothing_is_sampled(
    model: pt.Model, algorithm: str, rows: Any, given: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"train: .*{next(iter(given))}.* no effect here: only on-policy algorithms"):
        train(model, algorithm, rows, **given)


def test_plain_and_chat_rows_of_kto_are_not_mixed(model: pt.Model) -> None:
    plain = {"prompt": "c", "completion": "b", "label": True}
    chat = {"prompt": ASKED, "completion": [says("b")], "label": False}
    with pytest.raises(DataError, match="rows: row 0 is plain text and row 1 has chat messages"):
        train(model, "kto", [plain, chat])


@pytest.mark.parametrize("algorithm", ["grpo_pairs", choose("dpo", {"score_weighting": "weight"})])
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([(1, 1), (0.5, 0.5)], "the two scores of every pair are equal, .* nothing would be learnt"),
        ([(1, 0), (1e308, -1e308)], r"row 1: the scores differ by inf, and at most 1e\+15"),
    ],
)
def test_pairs_whose_scores_teach_nothing_are_refused(
    model: pt.Model, algorithm: Any, scores: list[tuple[float, float]], message: str
) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [pair | {"chosen_score": high, "rejected_score": low} for high, low in scores]
    with pytest.raises(DataError, match=message):
        train(model, algorithm, rows)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def test_an_answer_is_sampled_after_a_prompt_with_the_tools_of_its_row() -> None:
    enc = encoder("{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML + OPEN)
    without, offered = (check_prompt(enc, ASKED, "row 0", tools) for tools in (None, TOOLS))
    assert "weather" in enc.tokenizer.decode(offered)
    assert offered[-len(without) :] == without
    with pytest.raises(DataError, match="leaves out 'weather' of the conversation's tools"):
        train(pt.tiny(seed=0, **SMALL), "grpo", [{"prompt": ASKED, "tools": TOOLS}], reward=lengths, steps=1)
    with pytest.raises(DataError, match="offers tools, and its prompt is plain text"):
        train(pt.tiny(seed=0, **SMALL), "sft", [{"prompt": "a", "completion": "b", "tools": TOOLS}], steps=1)

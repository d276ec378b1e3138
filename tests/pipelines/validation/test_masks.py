"""The tokens that are trained, shown on the page and in a terminal."""

from __future__ import annotations

import pytest

from pipelines.data.tables import Row
from pipelines.validate import TokenLengths
from pipelines.validation.check import ValidationOutcome
from pipelines.validation.masks import EACH, HIDDEN, left_out, samples, trained_parts
from pipelines.validation.report import page
from pipelines.validation.view import TEMPLATE, content_view
from posttrain.data.conversations import TrainOn
from posttrain.data.tokens import TextEncoder
from posttrain.models.tiny import byte_tokenizer

ROW: Row = {
    "id": 3,
    "prompt": [{"role": "user", "content": "a"}],
    "completion": [
        {"role": "assistant", "content": "<b>"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ],
}


def test_parts_of_a_conversation_say_which_tokens_are_trained() -> None:
    encoder = TextEncoder(byte_tokenizer(256), 256)
    parts = trained_parts(encoder, "sft", ROW)["completion"]
    assert [text for text, _, trained in parts if trained] == ["<b><|im_end|>", "d<|im_end|>"]
    assert [count for _, count, trained in parts if trained] == [4, 2]
    prompt = trained_parts(encoder, "problems", {"id": 0, "prompt": "1+1="})["prompt"]
    assert prompt == [("1+1=", 4, False)]


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        ("last", ["d<|im_end|>"]),
        (
            "all",
            [
                "user\na<|im_end|>\n<|im_start|>assistant\n<b><|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
            ],
        ),
    ],
)
def test_the_trained_tokens_are_those_of_the_setting(train_on: TrainOn, trained: list[str]) -> None:
    encoder = TextEncoder(byte_tokenizer(256), 256)
    shown = trained_parts(encoder, "sft", ROW, train_on)["completion"]
    assert [text for text, _, is_trained in shown if is_trained] == trained
    assert shown[0] == ("<|im_start|>", 1, False) if train_on == "all" else not shown[0][2]
    assert trained_parts(encoder, "sft", ROW | {"expert": True}, train_on) == trained_parts(encoder, "sft", ROW)
    assert trained_parts(encoder, "labelled", ROW, train_on) == trained_parts(encoder, "labelled", ROW)


def _refused(row: Row, train_on: TrainOn) -> str:
    view = content_view("sft", [row], TokenLengths(TextEncoder(byte_tokenizer(256), 256), train_on))
    return str(view[TEMPLATE][0]) if TEMPLATE in view else ""


def test_validation_refuses_rows_that_the_setting_could_not_train() -> None:
    plain = {"id": 5, "prompt": "1+1=", "completion": "2"}
    assert "row 5: is plain text, which has no marks" in _refused(plain, "marked")
    assert "no {% generation %} marks" in _refused(ROW, "marked")
    weighed = ROW | {"completion": [*ROW["completion"][:2], {"role": "assistant", "content": "d", "weight": 0.0}]}
    assert "row 3: turn 3 (assistant) has the weight 0, and sft.train_on: all trains every turn alike" in _refused(
        weighed, "all"
    )
    assert "no token carries loss" in _refused(weighed, "last")
    assert _refused(plain | {"expert": True}, "marked") == ""
    assert [_refused(row, "completion") for row in (plain, ROW, weighed)] == ["", "", ""]


def test_the_page_marks_them_and_counts_what_ingest_left_out() -> None:
    encoder = TextEncoder(byte_tokenizer(256), 256)
    html = page(ValidationOutcome(), 5, {"sft": {"answers left out": 7}}, samples(encoder, {"sft": [ROW]}, 1))
    assert "<mark>&lt;b&gt;&lt;|im_end|&gt;</mark>" in html
    assert '<td>answers left out<td class="n">7' in html


def test_what_the_template_leaves_out_of_earlier_turns_is_counted() -> None:
    tokenizer = byte_tokenizer(256)
    encoder = TextEncoder(tokenizer, 256)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].split('</think>')[-1]"
    )
    answers = ["<think>x y</think>Plum", "Pear"]
    turns = [{"role": role, "content": text} for text in answers for role, text in (("user", "a"), ("assistant", text))]
    turns[0]["name"] = "Ada"
    row = {"id": 0, "prompt": turns[:1], "completion": turns[1:]}
    found = left_out(encoder, "sft", [row, row, {"id": 1, "prompt": "a", "completion": "b"}])
    assert found == {
        HIDDEN + EACH: 2,
        "turns whose `name` the chat template leaves out": 2,
    }
    assert left_out(encoder, "problems", [{"id": 0, "prompt": turns[2:3], "answer": "1"}]) == {}
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert left_out(encoder, "sft", [row]) == {}  # the rule chat_template reports such rows

"""The tokens that are trained, shown on the page and in a terminal."""

from __future__ import annotations

from pipelines.validation.check import ValidationOutcome
from pipelines.validation.masks import left_out, samples, trained_parts
from pipelines.validation.report import page
from posttrain.data.tokens import TextEncoder
from posttrain.models.tiny import byte_tokenizer

ROW = {
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
        "earlier turns whose reasoning the chat template leaves out": 2,
        "turns whose `name` the chat template leaves out": 2,
    }
    assert left_out(encoder, "problems", [{"id": 0, "prompt": turns[2:3], "answer": "1"}]) == {}
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert left_out(encoder, "sft", [row]) == {}  # the rule chat_template reports such rows

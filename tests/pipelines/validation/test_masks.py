"""The tokens that are trained, shown on the page and in a terminal."""

from __future__ import annotations

from pipelines.validation.check import ValidationOutcome
from pipelines.validation.masks import samples, trained_parts
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

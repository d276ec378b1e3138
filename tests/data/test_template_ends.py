"""Training teaches the ends that stop a sample, after the prompt that sampling is given."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.validation.masks import NO_END, OTHER_PROMPT, left_out
from posttrain.data.ends import end_tokens, template_end
from posttrain.data.tokens import TextEncoder
from posttrain.errors import DataError, ModelError
from posttrain.models.tiny import byte_tokenizer
from tests.data.test_conversations import CHATML, OPEN, THINKING, trained, turns

ALWAYS_OPEN = CHATML + "{{ '<|im_start|>assistant\n' }}"
BETWEEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
CLOSED_QUESTION = BETWEEN + "{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
NO_CLOSING = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"


def encoder(template: str, end: str = "<|im_end|>") -> TextEncoder:
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = template
    tokenizer.eos_token = end
    return TextEncoder(tokenizer, 512)


def row(*contents: str) -> dict[str, Any]:
    messages = turns(*contents)
    return {"id": 0, "prompt": messages[:1], "completion": messages[1:]}


def parts(enc: TextEncoder, *contents: str) -> list[str]:
    given = row(*contents)
    return trained(enc, enc.pair(given["prompt"], given["completion"], "7"))


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_nothing_after_the_end_of_an_answer_is_trained(end: str) -> None:
    """Before, a template that always opens the assistant's turn taught the model to open one after its answer."""
    enc = encoder(ALWAYS_OPEN, end)
    assert parts(enc, "hello", "world") == ["world<|im_end|>"]
    # a text may end as the template does
    assert parts(enc, "hello", "the assistant") == ["the assistant<|im_end|>"]
    with pytest.raises(DataError, match="row 7: it is not certain which tokens of turn 1"):
        parts(encoder(CHATML + "<|im_start|>footer", end), "hello", "world")


def test_an_end_of_the_whole_conversation_after_that_of_the_answer_is_not_trained() -> None:
    """Phi-3 ends conversations so; sampling has stopped before."""
    enc = encoder(
        CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
    )
    assert parts(enc, "hello", "world") == ["world<|im_end|>"]
    assert enc.ends == (enc.eos_id, 2)
    several = enc.pair(*(row("hello", "world", "more", "last")[name] for name in ("prompt", "completion")))
    assert trained(enc, several) == ["world<|im_end|>", "last<|im_end|>"]
    assert left_out(enc, "sft", [row("hello", "world", "more", "last")]) == {}


def test_a_footer_without_an_end_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 7: .* writes 'assistant:' after a last answer and not after others"):
        parts(encoder(PLAIN.partition("{% if add")[0] + "assistant: "), "hello", "world")
    assert parts(encoder(PLAIN), "hello", "world") == ["world\n<|im_end|>"]


@pytest.mark.parametrize("template", [CLOSED_QUESTION, BETWEEN + OPEN])
def test_a_token_that_closes_answers_only_before_a_further_turn_is_an_end_and_trained(template: str) -> None:
    enc = encoder(template, "<|endoftext|>")
    assert enc.end_origins == {enc.eos_id: "tokenizer", 2: "chat template"}
    assert parts(enc, "hello", "world", "more", "last") == ["world<|im_end|>", "last<|endoftext|>"]
    differs = template != CLOSED_QUESTION
    assert left_out(enc, "sft", [row("hello", "world", "more", "last")]) == ({OTHER_PROMPT: 2} if differs else {})


@pytest.mark.parametrize("change", ["replace('o','0')", "upper", "replace('e', '')|lower"])
def test_a_template_that_alters_texts_has_its_own_closing_token(change: str) -> None:
    altering = encoder(
        CHATML.replace("m['content']", f"m['content']|{change}").replace("m.content", f"m.content|{change}")
    )
    assert f"|{change}" in str(altering.tokenizer.chat_template)
    assert altering.ends == (2,)
    altering.tokenizer.eos_token = "<|endoftext|>"
    assert end_tokens(altering.tokenizer) == {0: "tokenizer", 2: "chat template"}
    altering.tokenizer.chat_template = "{% for m in messages %}<|im_start|>...<|im_end|>{% endfor %}"
    assert template_end(altering.tokenizer) is None


def test_how_the_next_question_opens_is_no_end() -> None:
    tokenizer = byte_tokenizer(512)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = NO_CLOSING
    assert template_end(tokenizer) is None


def test_an_end_before_the_answer_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"row 7: .* closes the turn before turn 1 \(assistant\) only as that one begins"
    ):
        parts(encoder(BETWEEN), "hello", "world")


@pytest.mark.parametrize(("template", "count"), [(PLAIN, 1), (CHATML + OPEN, 0), (CLOSED_QUESTION, 0)])
def test_answers_that_train_no_end_are_counted(template: str, count: int) -> None:
    enc = encoder(template)
    assert left_out(enc, "sft", [row("hello", "world", "more", "last")])[NO_END] == count
    assert left_out(enc, "sft", [row("hello", "world", "more")])[NO_END] == count
    assert left_out(enc, "sft", [row("hello", "world")])[NO_END] == 0


def test_answers_after_another_prompt_than_that_of_sampling_are_counted() -> None:
    """A generation prompt may open the reasoning, which the answers of a table do not have."""
    enc = encoder(THINKING)
    assert left_out(enc, "sft", [row("a", "Plum", "b", "Pear"), row("a", "<think>\nx</think>Plum")]) == {
        OTHER_PROMPT: 2
    }
    assert left_out(encoder(CHATML + OPEN), "sft", [row("a", "Plum", "b", "Pear")]) == {}
    assert left_out(encoder(CHATML), "sft", [row("a", "Plum", "b", "Pear")]) == {}


def test_fields_that_the_template_does_not_read_are_counted_by_name() -> None:
    messages = turns("a", "Plum")
    given = {
        "id": 0,
        "prompt": messages[:1],
        "completion": [messages[1] | {"quality": 3, "channel": "final", "weight": 1.0}],
    }
    shows = CHATML.replace("{{ m.content }}", "{{ m.channel or '' }}{{ m.content }}") + OPEN
    assert left_out(encoder(CHATML + OPEN), "sft", [given, given]) == {
        "turns whose `channel` the chat template leaves out": 2,
        "turns whose `quality` the chat template leaves out": 2,
    }
    assert left_out(encoder(shows), "sft", [given]) == {"turns whose `quality` the chat template leaves out": 1}


def test_a_template_that_is_no_jinja_is_named_as_such_when_the_model_is_read() -> None:
    tokenizer = byte_tokenizer(64)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }"
    with pytest.raises(
        ModelError,
        match=r"^check of the chat template: the model's chat template is no valid Jinja .*Correct chat_template",
    ):
        end_tokens(tokenizer)

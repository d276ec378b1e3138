"""Conversations as tokens: every assistant turn is trained, nothing else is, and a template that hides which is which is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.data.alignment import continuation_ids
from posttrain.data.batches import collate
from posttrain.data.tokens import TextEncoder, Tokens, table_tokens
from posttrain.data.turn_texts import hidden_reasoning
from posttrain.errors import DataError, ModelError
from posttrain.models.tiny import byte_tokenizer
from posttrain.training.supervised import Example, SupervisedObjective
from tests.models.small import policy

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + OPEN
)
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + OPEN
)
THINKING = CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML + OPEN
)
HIDDEN = "{{ messages | length }}" + CHATML.replace("m.content", "m.content + ' ' + m.content") + OPEN


def encoder(template: str | None = CHATML + OPEN) -> TextEncoder:
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = template
    return TextEncoder(tokenizer, 512)


def turns(*contents: str, first: str = "user") -> list[dict[str, Any]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def trained(enc: TextEncoder, tokens: Tokens) -> list[str]:
    """Return the trained parts of the response, joined tokens of one weight together."""
    parts, before = [], 0.0
    for i, weight in zip(tokens.response, tokens.weights or (1.0,) * len(tokens.response), strict=True):
        if weight and not before:
            parts.append([i])
        elif weight:
            parts[-1].append(i)
        before = weight
    return [enc.tokenizer.decode(part) for part in parts]


SILENT = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + OPEN
)
DATED = "Today is {{ strftime_now('%d %b %Y %H:%M:%S.%f') }}\n" + CHATML + OPEN
QUOTED = CHATML.replace("m.content", "m.content | tojson") + OPEN


@pytest.mark.parametrize(("template", "turn"), [(SILENT, r"turn 0 \(system\)"), ("hello" + OPEN, r"turn 0 \(system\)")])
def test_a_template_that_leaves_out_a_turn_is_refused(template: str, turn: str) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, *turns("Name a fruit")]
    for read in (lambda enc: enc.pair(prompt, "Plum", "5"), lambda enc: enc.prompt(prompt, row="5")):
        with pytest.raises(DataError, match=f"row 5: the model's chat template leaves out the text of {turn}"):
            read(encoder(template))
    assert trained(encoder(SILENT), encoder(SILENT).pair(turns("a"), "Plum")) == ["Plum<|im_end|>"]


def test_a_template_that_quotes_or_trims_a_turn_leaves_nothing_out() -> None:
    enc = encoder(QUOTED)
    text = enc.tokenizer.decode(enc.prompt([{"role": "user", "content": ' a "b"\nc \u00e9 '}]))
    assert "b" in text
    assert encoder(CHATML.replace("m.content", "m.content | trim") + OPEN).prompt(turns(" a  b\n"))


def test_a_date_in_the_template_is_always_the_same() -> None:
    first, second = encoder(DATED).pair(turns("a"), turns("b", first="assistant")), encoder(DATED).pair(turns("a"), "b")
    assert first.response == second.response
    assert "Today is 26 Jul 2024 00:00:00.000000" in encoder(DATED).tokenizer.decode(first.prompt)


def test_every_assistant_turn_is_trained_with_its_end_and_no_other_turn_is() -> None:
    enc = encoder()
    prompt, completion = turns("Name a fruit"), turns("Plum", "Another", "Pear", "thanks", first="assistant")
    tokens = enc.pair(prompt, completion)
    assert trained(enc, tokens) == ["Plum<|im_end|>", "Pear<|im_end|>"]
    whole = enc.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    assert whole.startswith(enc.tokenizer.decode(tokens.prompt + tokens.response))
    assert list(tokens.prompt) == enc.prompt(prompt)
    assert tokens.loss_tokens == len("Plum") + len("Pear") + 2


def test_one_answer_to_one_question_has_no_weights_and_the_template_is_applied_to_plain_prompts_too() -> None:
    enc = encoder()
    both = enc.pair(turns("Name a fruit"), turns("Plum", first="assistant"))
    assert both == enc.pair("Name a fruit", turns("Plum", first="assistant"))
    assert both.weights is None
    assert trained(enc, both) == ["Plum<|im_end|>"]


def test_the_last_turn_the_marked_ones_and_those_with_a_weight() -> None:
    prompt, completion = turns("a"), turns("Plum", "b", "Pear", first="assistant")
    enc = encoder()
    assert trained(enc, enc.pair(prompt, completion, train_on="last")) == ["Pear<|im_end|>"]
    weighted = [{**completion[0], "weight": 0}, completion[1], {**completion[2], "weight": 0.5}]
    tokens = enc.pair(prompt, weighted)
    assert trained(enc, tokens) == ["Pear<|im_end|>"]
    assert tokens.weights == (0.5,) * 5
    with pytest.raises(DataError, match=r"row 3.*no {% generation %} marks"):
        enc.pair(prompt, completion, "3", train_on="marked")
    marked = encoder(MARKED)
    assert trained(marked, marked.pair(prompt, completion, train_on="marked")) == ["Plum<|im_end|>", "Pear<|im_end|>"]
    assert trained(marked, marked.pair(prompt, completion)) == ["Plum<|im_end|>", "Pear<|im_end|>"]


def test_reasoning_that_the_template_strips_from_history_is_trained_as_rendered() -> None:
    enc = encoder(REASONING)
    completion = turns("<think>x</think>\n\nPlum", "b", "<think>y</think>\n\nPear", first="assistant")
    assert trained(enc, enc.pair(turns("a"), completion)) == ["Plum<|im_end|>", "<think>y</think>\n\nPear<|im_end|>"]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "Plum", "reasoning_content": "it is ripe"},
        {"role": "assistant", "content": "<think>it is ripe</think>Plum"},
    ],
)
def test_reasoning_that_the_template_never_shows_is_refused(turn: dict[str, str]) -> None:
    enc = encoder(CHATML.replace("m.content", "m.content.split('</think>')[-1]") + OPEN)
    with pytest.raises(
        DataError, match=r"row 5: the model's chat template leaves out the reasoning of turn 1 \(assistant\)"
    ):
        enc.pair(turns("a"), [turn], "5")
    # of an earlier turn it may be left out, which validation counts
    history = [*turns("a"), turn, *turns("b", "Pear")]
    assert trained(enc, enc.pair(history[:1], history[1:])) == ["Plum<|im_end|>", "Pear<|im_end|>"]
    assert hidden_reasoning(enc.template.render(history), history) == [1]
    shown = encoder(CHATML.replace("m.content", "(m.reasoning_content or '') + m.content") + OPEN)
    assert "it is ripe" in trained(shown, shown.pair(turns("a"), [turn]))[0]


def test_a_template_that_cuts_a_turn_is_refused() -> None:
    enc = encoder(CHATML.replace("m.content", "m.content[-30:]") + OPEN)
    with pytest.raises(DataError, match=r"leaves out the text of turn 0 \(user\)"):
        enc.pair(turns("x" * 31), "Plum")


def test_a_generation_prompt_that_opens_the_reasoning_is_not_doubled() -> None:
    enc = encoder(THINKING)
    tokens = enc.pair(turns("a"), turns("<think>\nx</think>Plum", first="assistant"))
    assert list(tokens.prompt) == enc.prompt(turns("a"))
    assert enc.tokenizer.decode(tokens.prompt + tokens.response).count("<think>") == 1
    assert trained(enc, tokens) == ["x</think>Plum<|im_end|>"]
    # an answer without reasoning is trained as it is rendered, from where it differs
    assert trained(enc, enc.pair(turns("a"), turns("<tag>", first="assistant"))) == ["<tag><|im_end|>"]


def test_what_a_template_refuses_or_hides_names_the_row() -> None:
    system = [{"role": "system", "content": "s"}, *turns("a")]
    with pytest.raises(DataError, match=r"row 4: .*System role not supported.*system, user"):
        encoder(NO_SYSTEM).prompt(system, row="4")
    with pytest.raises(DataError, match="row 5: it is not certain which tokens of turn 1"):
        encoder(HIDDEN).pair(turns("a"), turns("Plum", "b", "Pear", first="assistant"), "5")
    with pytest.raises(DataError, match="row 6: no token carries loss"):
        encoder().pair(turns("a"), [{"role": "user", "content": "b"}], "6")
    with pytest.raises(ModelError, match=r"row 7: .*no chat template"):
        encoder(None).pair(turns("a"), "Plum", "7")


@pytest.mark.parametrize("filters", ["upper", "trim | lower"])
def test_a_template_that_changes_letters_is_refused(filters: str) -> None:
    enc = encoder(CHATML.replace("m.content", f"m.content | {filters}") + OPEN)
    with pytest.raises(DataError, match=r"row 5: .*changes the letters of turn 0 \(user\).*'Hi X' is not in"):
        enc.pair(turns("Hi X"), turns("Abc", first="assistant"), "5")
    with pytest.raises(DataError, match=r"turn 1 \(assistant\).*'Abc' is not in"):
        enc.pair(turns("7"), turns("Abc", first="assistant"), "5")
    trimmed = encoder(CHATML.replace("m.content", "m.content | trim") + OPEN)
    assert "Hi X" in trimmed.tokenizer.decode(trimmed.prompt(turns(" Hi X ")))


def test_a_template_that_is_no_jinja_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match=r"is no valid Jinja .*Correct chat_template"):
        encoder("{% for m in messages %}{{ m.content }").prompt(turns("a"), row="5")


def test_tools_are_rendered_and_a_tool_s_answer_is_not_trained() -> None:
    enc = encoder(
        "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}" + OPEN
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Graz"}}}
    completion = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains"},
    ]
    row = {"id": 0, "prompt": turns("Weather?"), "completion": completion, "tools": '[{"name": "weather"}]'}
    (tokens,) = table_tokens(enc, [row], "completion")
    calls, answer = trained(enc, tokens)
    assert '"city": "Graz"' in calls
    assert calls.endswith("<|im_end|>")
    assert answer == "It rains<|im_end|>"
    assert enc.tokenizer.decode(tokens.prompt).startswith('[{"name": "weather"}]')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"tools": '[{"type": "function", "function": {"name": "weather"}}]'},
            "leaves out 'weather' of the conversation's tools",
        ),
        (
            {"tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
            "leaves out 'weather' of the call in turn 1",
        ),
    ],
)
def test_a_template_that_shows_no_tools_is_refused_with_them(change: dict[str, Any], words: str) -> None:
    answer = {"role": "assistant", "content": "I look", **{k: v for k, v in change.items() if k == "tool_calls"}}
    row = {"id": 0, "prompt": turns("Weather?"), "completion": [answer, *turns("and?", "rain")]}
    if "tools" in change:
        row["tools"] = change["tools"]
    with pytest.raises(DataError, match=words):
        table_tokens(encoder(), [row], "completion")


def spaced() -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a space before the first word, as SentencePiece does."""
    words = ["<unk>", "</s>", "\u2581", "2", "+", "=", "4", "\u25812", "\u25814", "\n"]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [("\u2581", "2"), ("\u2581", "4")], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def test_a_completion_has_no_space_that_nobody_wrote_and_one_end() -> None:
    tokenizer = spaced()
    assert continuation_ids(tokenizer, "4") == [6]
    assert continuation_ids(tokenizer, " 4") == tokenizer(" 4")["input_ids"]
    tokens = TextEncoder(tokenizer, 32).pair("2+2=", "4")
    assert tokenizer.decode(tokens.prompt + tokens.response[:-1]) == "2+2=4"
    assert TextEncoder(tokenizer, 32).completion("4</s>") == [6, 1]


def test_rewards_see_special_tokens_and_only_the_end_is_cut() -> None:
    enc = encoder()
    enc.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    ids = enc.tokenizer("<think>x")["input_ids"]
    assert enc.text([*ids, enc.eos_id]) == "<think>x"
    assert enc.text(ids) == "<think>x"


def test_the_loss_of_tokens_with_weights_is_the_weighted_mean_of_those_that_have_one() -> None:
    model = policy()
    rows = [Tokens((1, 2), (3, 4, 5), weights=(1.0, 0.0, 0.5)), Tokens((1,), (6, 7))]
    objective = SupervisedObjective()
    examples = [Example(rows[0], 2.0), Example(rows[1])]
    assert objective.counts(examples) == {"tokens": 4.0, "weighted_tokens": 2.0 * 1.5 + 2.0}
    loss = objective.terms(model, examples).losses["nll"][0]
    plain = model(collate([Tokens(row.prompt, row.response) for row in rows])).logprobs
    by_hand = -(2.0 * (plain[0, 0] + 0.5 * plain[0, 2]) + plain[1, 0] + plain[1, 1])
    assert torch.allclose(loss, by_hand, atol=1e-5)

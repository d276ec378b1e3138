"""Templates that show an answer differently once the conversation goes on: each answer as an example after its own prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain as pt
from pipelines.config.schema import OnPolicyBudget
from pipelines.data.tables import write_rows
from pipelines.training.on_policy import _demonstrations
from pipelines.validate import TokenLengths
from pipelines.validation.masks import CONTROL, EACH, HIDDEN, OTHER_PROMPT, left_out, trained_parts
from posttrain.algorithms import PRESETS, OnPolicy
from posttrain.data.batches import EpochOrder, collate
from posttrain.data.tokens import TextEncoder, Tokens, asked_and_answered, table_answers
from posttrain.errors import ConfigError, DataError
from posttrain.models.policy import Policy
from posttrain.models.tiny import byte_tokenizer
from posttrain.training.supervised import Example, RowSource, SupervisedObjective
from tests.data.test_conversations import CHATML, OPEN, encoder, trained, turns
from tests.data.test_stand_ins import call, said, tool
from tests.models.small import policy

HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}{% if m.thinking and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to={{ m.tool_calls[0].function.name }}<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif loop.last %}{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""As gpt-oss's: only a last answer has its reasoning and the token that ends sampling."""
FINAL = "<|channel|>final<|message|>"


def harmony() -> TextEncoder:
    tokenizer = byte_tokenizer(2048)
    marks = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template, tokenizer.eos_token = HARMONY, "<|return|>"
    return TextEncoder(tokenizer, 2048, configured_ends=(tokenizer.convert_tokens_to_ids("<|call|>"),))


def row(*completion: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": 7, "prompt": turns("Hi"), "completion": list(completion), **more}


def parts(enc: TextEncoder, given: dict[str, Any]) -> list[list[str]]:
    return [trained(enc, tokens) for tokens in enc.answers(given["prompt"], given["completion"], "7")]


TALK = row(said("A", thinking="x"), *turns("B"), said("C", thinking="y"), *turns("cut off"))


def test_every_answer_trains_whole_after_the_prompt_by_which_sampling_asks_for_it() -> None:
    enc = harmony()
    with pytest.raises(DataError, match=r"row 7: .*turn 1 .*sft\.train_on: each"):
        enc.pair(TALK["prompt"], TALK["completion"], "7")
    first, second = enc.answers(TALK["prompt"], TALK["completion"], "7")
    expected = [
        f"<|channel|>analysis<|message|>{x}<|end|><|start|>assistant{FINAL}{a}<|return|>" for x, a in ("xA", "yC")
    ]
    assert [trained(enc, tokens) for tokens in (first, second)] == [[text] for text in expected]
    assert list(first.prompt) == enc.prompt(TALK["prompt"])
    # the first answer is history now, and the template shows it without its reasoning
    history = [*TALK["prompt"], said("A"), *turns("B")]
    assert list(second.prompt) == enc.prompt(history)
    assert left_out(enc, "sft", [TALK], "each") == {}


def test_a_call_trains_with_its_reasoning_although_a_later_answer_hides_it() -> None:
    given = row(call("Graz", thinking="look"), tool("rain"), said("Rain"))
    enc = harmony()
    assert parts(enc, given) == [
        ['<|channel|>analysis<|message|>look<|end|><|start|>assistant to=weather<|message|>{"city": "Graz"}<|call|>'],
        [f"{FINAL}Rain<|return|>"],
    ]
    # sampling would ask for the last one in the same words, so nothing is counted
    assert left_out(enc, "sft", [given], "each") == {}


def test_turns_with_weight_0_and_plain_rows() -> None:
    enc = harmony()
    given = row(said("A", weight=0), *turns("B"), said("C", weight=0.5))
    (tokens,) = enc.answers(given["prompt"], given["completion"], "7")
    assert (trained(enc, tokens), tokens.weights) == ([f"{FINAL}C<|return|>"], (0.5,) * tokens.loss_tokens)
    assert enc.answers("1+1=", "2") == [enc.pair("1+1=", "2")]
    with pytest.raises(DataError, match="row 7: no token carries loss"):
        enc.answers(turns("Hi"), [said("A", weight=0)], "7")


def test_the_setting_reaches_page_preview_and_lengths() -> None:
    enc = harmony()
    shown = trained_parts(enc, "sft", TALK, "each")
    assert list(shown) == ["completion, answer 1 of 2", "completion, answer 2 of 2"]
    assert [text for text, _, is_trained in shown["completion, answer 2 of 2"] if is_trained] == [
        f"<|channel|>analysis<|message|>y<|end|><|start|>assistant{FINAL}C<|return|>"
    ]
    prompt, completion = TokenLengths(enc, "each").pair(TALK, "completion")
    longest = enc.answers(TALK["prompt"], TALK["completion"])[1]
    assert (prompt, prompt + completion) == (len(enc.prompt(TALK["prompt"])), len(longest))
    short = TextEncoder(enc.tokenizer, len(longest) - 1)
    with pytest.raises(DataError, match=r"row 7: .* exceed the model's context"):
        table_answers(short, [TALK], "completion", "each")


def test_the_loss_of_a_conversation_is_the_mean_over_the_tokens_of_all_its_answers() -> None:
    model = policy()
    answers = [Tokens((1, 2), (3, 4)), Tokens((1, 2, 3, 4, 5), (6,))]
    rows = [[Example(tokens) for tokens in answers], [Example(Tokens((7,), (8, 9)))]]
    (batch,) = RowSource(rows, EpochOrder(2, 2, 1, 0)).next(1).batches
    assert sorted(len(example.tokens) for example in batch) == [3, 4, 6]
    objective = SupervisedObjective()
    loss = objective.terms(model, batch).losses["nll"][0] / objective.counts(batch)["weighted_tokens"]
    plain = [model(collate([example.tokens])).logprobs[0] for row in rows for example in row]
    assert torch.allclose(loss, -torch.cat([p[:n] for p, n in zip(plain, (2, 1, 2), strict=True)]).sum() / 5, atol=1e-5)


STRIPPING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}" + OPEN
)


def test_reasoning_of_earlier_answers_trains_with_each_and_is_counted_without_it() -> None:
    enc = encoder(STRIPPING)
    given = row(said("<think>x</think>A"), *turns("B"), said("<think>y</think>C"))
    assert left_out(enc, "sft", [given]) == {HIDDEN + EACH: 1}
    assert left_out(enc, "sft", [given], "each") == {}
    assert parts(enc, given) == [["<think>x</think>A<|im_end|>"], ["<think>y</think>C<|im_end|>"]]


PHI = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)


def test_a_footer_that_only_a_whole_conversation_has_hides_no_earlier_answer() -> None:
    """As Phi-3's: after the last answer's own end follows the end of the conversation."""
    tokenizer = byte_tokenizer(512)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template, tokenizer.eos_token = PHI, "<|endoftext|>"
    enc = TextEncoder(tokenizer, 512)
    tokens = enc.pair(turns("a"), [said("A"), *turns("b"), said("B"), *turns("c"), said("C"), *turns("d")], "7")
    assert trained(enc, tokens) == ["A<|im_end|>", "B<|im_end|>", "C<|im_end|>"]


DEEP = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|A|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<|tool|>{{ c.function.name }} {{ '' + c.function.arguments }}{% endfor %}<|im_end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|A|><think>\n{% endif %}"
)


def deep() -> TextEncoder:
    tokenizer = byte_tokenizer(512)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|A|>", "<|tool|>", "<|user|>", "<think>"]})
    tokenizer.chat_template = DEEP
    return TextEncoder(tokenizer, 512)


def test_a_token_that_begins_as_the_generation_prompt_goes_on_is_not_cut() -> None:
    """As DeepSeek's, whose calls begin with a special token, and whose generation prompt ends with one of the same first letter."""
    enc = deep()
    given = row(call("Graz"), tool("rain"), said("Rain"))
    tokens = enc.pair(given["prompt"], given["completion"], "7")
    assert trained(enc, tokens)[0] == '<|tool|>weather {"city": "Graz"}<|im_end|>'
    assert tokens.response[0] == enc.tokenizer.convert_tokens_to_ids("<|tool|>")
    # calls whose arguments the template joins as text are counted as others are
    assert left_out(enc, "sft", [given])[OTHER_PROMPT] == 2


@pytest.mark.parametrize("text", ["print('<|im_end|>')", "A<|im_end|>\n<|im_start|>user\nB"])
def test_an_answer_that_goes_on_after_an_end_that_it_spells_is_refused(text: str) -> None:
    with pytest.raises(
        DataError, match=r"row 7: the text of turn 1 \(assistant\) contains '<\|im_end\|>'.* never learn the rest"
    ):
        encoder().pair(turns("a"), [said(text)], "7")
    assert parts(encoder(), row(said("A<|im_end|>"))) == [["A<|im_end|>"]]


def test_texts_that_spell_tokens_of_the_template_are_counted() -> None:
    given = row(said("A")) | {"prompt": turns("Hi<|im_end|>\n<|im_start|>assistant\nyes")}
    assert left_out(encoder(), "sft", [given, row(said("A"))]) == {CONTROL: 1}
    assert left_out(encoder(), "problems", [{"id": 0, "prompt": turns("<|im_start|>")}]) == {CONTROL: 1}
    assert left_out(encoder(CHATML + OPEN), "sft", [row(said("<|endoftext|> is no part of it"))]) == {}


@pytest.mark.parametrize("template", [CHATML + OPEN, STRIPPING, DEEP])
def test_an_answer_without_text_trains_its_end(template: str) -> None:
    enc = deep() if template == DEEP else encoder(template)
    tokens = enc.pair(turns("a"), [said(""), *turns("b"), said("B")], "7")
    assert [text.split("\n")[-1] for text in trained(enc, tokens)] == ["<|im_end|>", "B<|im_end|>"]


def speaker() -> pt.Model:
    """Return a small model with the tokens of gpt-oss's template."""
    enc = harmony()
    lm = pt.tiny(0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, max_length=2048).lm
    torch.manual_seed(0)
    lm.resize_token_embeddings(len(enc.tokenizer), mean_resizing=False)
    return pt.Model(lm, enc)


def test_the_library_trains_each_answer_and_demonstrations_follow() -> None:
    whole = {"prompt": TALK["prompt"], "completion": TALK["completion"]}
    apart = [{"prompt": asked, "completion": [answer]} for asked, answer in asked_and_answered(*whole.values())]

    def trained_by(rows: list[dict[str, Any]], algorithm: str = "sft", **more: Any) -> list[dict[str, float]]:
        given: dict[str, Any] = {"reward": "answer", "samples": 2, "max_new_tokens": 2} if algorithm == "chord" else {}
        return pt.train(speaker(), algorithm, rows, steps=1, learning_rate=0.01, batch_size=2, **given, **more)

    (step,) = trained_by([whole, whole], train_on="each")
    # the mean over the tokens of both answers of both rows, each after the prompt by which it is asked for
    model = speaker()
    answers = model.encoder.answers(*whole.values())
    logprobs = [Policy(model.lm)(collate([tokens])).logprobs.sum().item() for tokens in answers]
    count = sum(tokens.loss_tokens for tokens in answers)
    assert step["loss"] == pytest.approx(-sum(logprobs) / count, abs=1e-5)
    asked = [{"prompt": "a", "answer": "1"}]
    (each,) = trained_by(asked, "chord", train_on="each", demonstrations=[whole])
    assert each == trained_by(asked, "chord", demonstrations=apart)[0]
    assert each["expert/loss"] == pytest.approx(step["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "value", "message"),
    [
        ("dpo", "each", "train_on = 'each' has no effect here.* put the turns before its last answer into the prompt"),
        ("chord", "last", "demonstrations train with completion or each"),
        ("sft", "answers", "train_on = 'answers'; it is one of completion, last, each, marked, all"),
    ],
)
def test_a_setting_without_meaning_is_refused(algorithm: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pt.train(
            pt.tiny(0, hidden_size=16, layers=1, heads=2, kv_heads=1),
            algorithm,
            [],
            steps=1,
            learning_rate=0.1,
            batch_size=1,
            train_on=value,
        )


def test_expert_rows_follow_each_in_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    enc, chord = harmony(), PRESETS["chord"]
    write_rows("sft", [TALK], Path("data/valid/sft.parquet"))
    assert isinstance(chord, OnPolicy)
    budget = OnPolicyBudget.model_construct(prompts_per_step=2)
    found = _demonstrations(chord, enc, budget, 0, "each")
    assert found is not None
    assert [*found.rows] == enc.answers(TALK["prompt"], TALK["completion"])
    with pytest.raises(DataError, match="in a pair, put the turns before the last answer into the prompt"):
        _demonstrations(chord, enc, budget, 0)
    expert = TALK | {"expert": True}
    assert trained_parts(enc, "sft", expert, "each") == trained_parts(enc, "sft", TALK, "each")
    assert TokenLengths(enc, "each").pair(expert, "completion") == TokenLengths(enc, "each").pair(TALK, "completion")
    assert left_out(enc, "sft", [expert], "each") == {}

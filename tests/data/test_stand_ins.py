"""Conversations with tools and reasoning: which tokens train if a template shows earlier turns otherwise, and the parts it must show."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.tokens import TextEncoder
from posttrain.errors import DataError
from tests.data.test_conversations import CHATML, OPEN, encoder, trained, turns

CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
TURN = "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
PLAIN = TURN + "{{ m.content }}" + CALLS + OPEN
THINKING = (
    "{% set ns = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}"
    "{% endfor %}"
    + TURN
    + "{% if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}" + CALLS + OPEN
)
"""As Qwen3's: reasoning is shown after the last question only, and a last turn always has a place for it."""
NAMED = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.role == 'tool' %}{{ messages[loop.index0 - 1].tool_calls[0].function.name }}: {% endif %}{{ m.content }}",
)


def call(*cities: str, content: str = "", **more: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}} for city in cities]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def bare(arguments: Any = "{}") -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}],
    }


def tool(content: str) -> dict[str, str]:
    return {"role": "tool", "content": content}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def parts(template: str, completion: list[dict[str, Any]]) -> list[str]:
    enc = encoder(template)
    return trained(enc, enc.pair(turns("Weather?"), completion, "5"))


CALLED = '<tool_call>weather {"city": "Graz"}</tool_call>'
LAST = "<think>\n\n</think>\n\nRain<|im_end|>"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ([call("Graz"), tool("rain"), said("Rain")], [f"{CALLED}<|im_end|>", LAST]),
        ([call("Graz", content="Wait."), tool("rain"), said("Rain")], [f"Wait.{CALLED}<|im_end|>", LAST]),
        (
            [call("Graz", "Linz"), tool("rain"), tool("sun"), said("Rain")],
            [f"{CALLED}{CALLED.replace('Graz', 'Linz')}<|im_end|>", LAST],
        ),
        (
            [call("Graz"), tool("rain"), call("Graz"), tool("rain"), said("Rain")],
            [f"{CALLED}<|im_end|>", f"{CALLED}<|im_end|>", LAST],
        ),
        (
            [call("Graz", reasoning_content="look"), tool("rain"), said("Rain", reasoning_content="seen")],
            [f"<think>\nlook\n</think>\n\n{CALLED}<|im_end|>", "<think>\nseen\n</think>\n\nRain<|im_end|>"],
        ),
        (
            [
                call("Graz", reasoning_content="look"), tool("rain"), said("Wet", reasoning_content="seen"),
                *turns("Sure?"), said("Rain", reasoning_content="yes"),
            ],
            [f"{CALLED}<|im_end|>", "Wet<|im_end|>", "<think>\nyes\n</think>\n\nRain<|im_end|>"],
        ),
        ([said("Wet", reasoning_content="r"), *turns("Sure?"), said("Rain")], ["Wet<|im_end|>", LAST]),
        ([said("Wet"), said("Rain")], ["Wet<|im_end|>", LAST]),
    ],
)  # fmt: skip
def test_turns_that_a_template_shows_otherwise_at_the_end_are_trained_as_rendered(
    completion: list[dict[str, Any]], expected: list[str]
) -> None:
    assert parts(THINKING, completion) == expected


@pytest.mark.parametrize("arguments", [{}, {"days": 3, "x": {"y": [1, 2]}}, "Graz now"])
def test_arguments_of_any_kind_are_trained(arguments: Any) -> None:
    turn = call("Graz")
    turn["tool_calls"][0]["function"]["arguments"] = arguments
    first, last = parts(THINKING, [turn, tool("rain"), said("Rain")])
    assert first.startswith("<tool_call>weather ")
    assert first.endswith("</tool_call><|im_end|>")
    assert last == LAST


def test_a_name_that_the_template_repeats_in_the_tool_s_turn_is_trained_once() -> None:
    completion = [call("Graz"), tool("rain"), said("Rain")]
    assert parts(NAMED, completion) == [f"{CALLED}<|im_end|>", "Rain<|im_end|>"]
    both = THINKING.replace("{{ m.content }}", NAMED[len(TURN) :].partition("{{ m.content }}")[0] + "{{ m.content }}")
    assert parts(both, completion) == [f"{CALLED}<|im_end|>", LAST]


NO_TOOL = PLAIN.replace("in messages", "in messages if m.role != 'tool'")
NO_TEXT = PLAIN.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
NO_ARGUMENTS = PLAIN.replace("{{ c.function.arguments | tojson }}", "")


@pytest.mark.parametrize(
    ("template", "completion", "words"),
    [
        (NO_TOOL, [call("Graz"), tool("rain"), said("Wet")], r"leaves out the text of turn 2 \(tool\)"),
        # a text that another turn has, too, would hide what is left out
        (NO_TOOL, [call("Graz"), tool("rain"), said("rain")], r"leaves out the text of turn 2 \(tool\)"),
        (NO_TEXT, [call("Graz", content="Wait."), tool("rain"), said("Wet")], r"text of turn 1 .*comes with the call"),
        (NO_ARGUMENTS, [call("Graz"), tool("rain"), said("Wet")], "the argument 'city' of the call in turn 1"),
        (NO_ARGUMENTS, [call("weather"), tool("rain"), said("Wet")], "the argument 'city' of the call in turn 1"),
    ],
)
def test_a_template_that_leaves_out_a_part_of_a_turn_is_refused(
    template: str, completion: list[dict[str, Any]], words: str
) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=f"row 5: the model's chat template .*{words}"):
            parts(template, completion)
    assert parts(PLAIN, completion)[-1].endswith("<|im_end|>")


def test_a_form_that_was_shown_once_hides_no_other() -> None:
    enc: TextEncoder = encoder(NO_TOOL)
    assert trained(enc, enc.pair(turns("a"), [said("b")], "0")) == ["b<|im_end|>"]
    with pytest.raises(DataError, match="row 1"):
        enc.pair(turns("a"), [call("Graz"), tool("rain"), said("Wet")], "1")
    assert trained(enc, enc.pair(turns("a"), [said("c")], "2")) == ["c<|im_end|>"]


def test_an_answer_that_spells_its_end_trains_one() -> None:
    assert parts(PLAIN, [said("Plum<|im_end|>")]) == ["Plum<|im_end|>"]


JOINED = PLAIN.replace(
    "{{ c.function.name }} {{ c.function.arguments | tojson }}", "{{ c.function.name + ' ' + c.function.arguments }}"
)
"""As DeepSeek's: the arguments are joined as text."""


def test_calls_are_written_as_the_template_expects_them() -> None:
    completion = [call("Graz"), tool("rain"), call("Linz", content="And?"), tool("sun"), said("Rain")]
    assert parts(JOINED, completion) == [
        f"{CALLED}<|im_end|>", f"And?{CALLED.replace('Graz', 'Linz')}<|im_end|>", "Rain<|im_end|>"
    ]  # fmt: skip


def test_a_template_without_calls_is_refused_in_every_spelling() -> None:
    with pytest.raises(DataError, match="leaves out 'weather' of the call in turn 1"):
        parts(CHATML + OPEN, [call("Graz"), tool("rain"), said("Rain")])


def test_turns_that_only_a_last_one_closes_otherwise_leave_the_last_one_to_train() -> None:
    template = PLAIN.replace(CALLS, "{{ '<|im_end|>' if loop.last else '<|end|>' }}{% endfor %}")
    enc, completion = encoder(template), [said("Wet"), *turns("Sure?"), said("Rain")]
    with pytest.raises(
        DataError, match=r"row 5: .*tokens of turn 1 .*train each answer after its own prompt \(sft\.train_on: each\)"
    ):
        enc.pair(turns("Weather?"), completion, "5")
    assert trained(enc, enc.pair(turns("Weather?"), completion, "5", train_on="last")) == ["Rain<|im_end|>"]


TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
LISTED = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "answer", "named"),
    [
        (PLAIN, [call("Graz")], "of the conversation's tools"),  # the name is in the call only
        (PLAIN.replace("m.role == 'tool'", "false"), [said("weather?")], "of the conversation's tools"),
        (
            LISTED + PLAIN.replace(CALLS, "<|im_end|>\n{% endfor %}"),
            [bare()],
            "of the call in turn 1",
        ),  # among the tools only
    ],
)
def test_a_tool_or_a_call_that_is_not_shown_is_refused_although_its_name_is(
    template: str, answer: list[dict[str, Any]], named: str
) -> None:
    with pytest.raises(DataError, match=f"row 5: .* leaves out 'weather' {named}"):
        encoder(template).tokens(turns("Weather?"), answer, "5", [TOOL])


@pytest.mark.parametrize("arguments", [{"ok": True}, '{"ok": true}'], ids=["object", "text"])
@pytest.mark.parametrize("shown", ["c.function.arguments | tojson", "c.function.arguments"])
def test_arguments_are_json_whether_the_template_expects_an_object_or_text(shown: str, arguments: Any) -> None:
    template = LISTED + PLAIN.replace("c.function.arguments | tojson", shown)
    enc = encoder(template)
    tokens = enc.tokens(turns("Weather?"), [bare(arguments)], "5", [TOOL])
    assert trained(enc, tokens) == ['<tool_call>weather {"ok": true}</tool_call><|im_end|>']

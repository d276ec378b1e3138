"""A chat template is a program of the model's author: it is stopped when it never ends or eats memory."""

from __future__ import annotations

import signal
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import posttrain.data.conversations as conversations
from posttrain.data.limits import bounded
from posttrain.errors import DataError, ModelError

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
POWER = "{{ 9 ** 999999999 }}"  # Jinja computes it when it compiles the template, and again when it renders
SQUARES = "{% set x = namespace(v=3) %}{% for i in range(60) %}{% set x.v = x.v * x.v %}{% endfor %}{{ x.v }}"
HUNGRY = "{% set x = 'a' * 9999999999 %}{{ x }}"


def template(text: str) -> conversations.ChatTemplate:
    def apply(messages: Any, tools: Any, add_generation_prompt: bool, tokenize: bool) -> str:
        texts, _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=add_generation_prompt)
        return str(texts[0])

    tokenizer: Any = SimpleNamespace(chat_template=text, apply_chat_template=apply)
    return conversations.ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ENDLESS, "more than 0.2 s"),
        (POWER, "more than 0.2 s"),
        (SQUARES, "more than 0.2 s"),
        (HUNGRY, "more than 1 GiB"),
    ],
)
def test_a_template_without_bounds_is_stopped(text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "bounded", partial(bounded, seconds=0.2))
    with pytest.raises(ModelError, match=words):
        template(text).render([{"role": "user", "content": "x"}], row="3")


def test_a_template_that_raises_is_told_with_its_row() -> None:
    with pytest.raises(DataError, match="refuses the conversation"):
        template("{{ raise_exception('no') }}").render([{"role": "user", "content": "x"}], row="3")


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
ASKED, SAID = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("text", "turns", "advice"),
    [
        (
            "{{ messages[9].content + 'x' }}",
            [{"role": "system", "content": "s"}, ASKED],
            "Put the system message into the user's",
        ),
        (
            "{% for m in messages %}{{ m.content + '.' }}{% endfor %}",
            [ASKED, CALL],
            "Turn 1 is a tool call which has no text",
        ),
        (
            "{% for m in messages %}{{ m.content if loop.index0 < 2 else raise_exception('long') }}{% endfor %}",
            [ASKED, SAID, ASKED],
            "It allows a question and its answer",
        ),
        ("{{ messages[9].content + 'x' }}", [ASKED, SAID, ASKED], "It refuses a plain question and its answer, too"),
        ("{{ messages[9].content + 'x' }}", [ASKED], "The template may be broken"),
    ],
)
def test_the_advice_fits_the_row(text: str, turns: list[dict[str, object]], advice: str) -> None:
    with pytest.raises(DataError) as refused:
        template(text).render(turns, row="3")
    assert advice in str(refused.value)
    assert ("system" in str(refused.value)) == any(turn["role"] == "system" for turn in turns)


def test_an_alarm_that_is_set_already_keeps_its_time() -> None:
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        with pytest.raises(TimeoutError, match=r"0\.1 s"), bounded(seconds=0.1):
            time.sleep(60)
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] < 59.95
        with bounded(seconds=90):
            assert signal.getsignal(signal.SIGALRM) is before[0], "the outer alarm is due first"
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before[1])

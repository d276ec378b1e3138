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

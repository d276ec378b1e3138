"""The supervised step's own decisions."""

from __future__ import annotations

import pytest

from pipelines.sft import _drop_untrained_template
from posttrain.data.tokens import TextEncoder
from posttrain.models.tiny import CHAT_TEMPLATE, byte_tokenizer

PLAIN = {"prompt": "1 + 1 =", "completion": "2"}
CHAT = {"prompt": [{"role": "user", "content": "1 + 1 ="}], "completion": "2"}
MESSAGES = {"messages": [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]}


@pytest.mark.parametrize(("rows", "kept"), [([PLAIN], False), ([PLAIN, CHAT], True), ([MESSAGES], True)])
def test_the_built_in_template_is_shipped_only_if_a_conversation_was_trained(
    rows: list[dict[str, object]], kept: bool
) -> None:
    encoder = TextEncoder(byte_tokenizer(64), 64)
    _drop_untrained_template(encoder, rows)
    assert encoder.tokenizer.chat_template == (CHAT_TEMPLATE if kept else None)


def test_the_template_of_a_downloaded_model_stays() -> None:
    encoder = TextEncoder(byte_tokenizer(64), 64)
    encoder.tokenizer.chat_template = "{{ messages }}"
    _drop_untrained_template(encoder, [PLAIN])
    assert encoder.tokenizer.chat_template == "{{ messages }}"

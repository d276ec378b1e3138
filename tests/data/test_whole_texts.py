"""A reward model that was trained elsewhere reads conversations as its own template renders them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.data.whole_texts import read_texts, reads_same_tokens, whole_texts
from posttrain.errors import DataError
from posttrain.models.inference import scores
from posttrain.models.tiny import byte_tokenizer
from posttrain.rewards.sources import ModelReward, RewardBatch
from posttrain.rollouts.engine import Completion
from posttrain.rollouts.groups import Problem, reward_batch
from tests.data.test_conversations import CHATML, OPEN, encoder
from tests.models import small

ENCODER = encoder(CHATML + OPEN)


def plain_encoder() -> TextEncoder:
    tokenizer = byte_tokenizer(64)
    tokenizer.chat_template = None
    return TextEncoder(tokenizer, 64)


def test_text_becomes_turns_of_the_template() -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = whole_texts(ENCODER, ["hi", [system, {"role": "user", "content": "hi"}]], ["ho", ""])
    for row, turns in zip(
        rows,
        (
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
            [system, {"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}],
        ),
        strict=True,
    ):
        text = ENCODER.tokenizer.apply_chat_template(turns, tokenize=False)
        assert list(row.prompt + row.response) == ENCODER.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_without_a_template_prompt_and_answer_are_joined_and_turns_are_refused() -> None:
    enc = plain_encoder()
    (row,) = whole_texts(enc, ["1+1="], ["2"])
    assert list(row.prompt + row.response) == [*enc.prompt("1+1="), *enc.completion("2")]
    with pytest.raises(
        DataError, match=r"row 0: .* the tokenizer of the reward model has no chat template; .* reward\.source"
    ):
        whole_texts(enc, [[{"role": "user", "content": "hi"}]], ["ho"])


def test_over_long_texts_lose_their_start_and_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    enc = plain_encoder()
    (long, short), cut = read_texts(enc, ["a" * 80, "b"], ["cd", "cd"])
    assert cut == 1
    reward = ModelReward("rm", small.scorer(), 0.0, 100, encoder=enc)
    for _ in range(2):
        reward.score(RewardBatch(["a" * 80, "b", "c", "d"], ["cd"] * 4, small.rows(4), {}))
    assert reward.used() == {"cut": 2 / 8}
    assert reward.used() == {}
    assert capsys.readouterr().err.count("1 of 4 conversations exceed the reward model's context of 64 tokens") == 1
    assert len(long) == 64
    assert long.response == short.response == (enc.eos_id,)
    assert list(long.prompt[-2:]) == list(short.prompt[-2:])


def test_the_same_tokens_need_the_same_vocabulary_and_template() -> None:
    assert reads_same_tokens(ENCODER, encoder(CHATML + OPEN))
    assert not reads_same_tokens(ENCODER, plain_encoder())
    other = plain_encoder()
    other.tokenizer.add_tokens(["<extra>"])
    assert not reads_same_tokens(plain_encoder(), other)


def test_its_score_does_not_depend_on_the_policys_tokens() -> None:
    scorer, enc = small.scorer(), plain_encoder()
    answers = RewardBatch(["ab", "c"], ["d", "ef"], small.rows(2), {})
    found = ModelReward("rm", scorer, 0.5, 100, encoder=enc).score(answers)
    assert found == ModelReward("rm", scorer, 0.5, 100, encoder=enc).score(replace(answers, tokens=small.rows(6)[3:5]))
    by_tokens = ModelReward("rm", scorer, 0.5, 100).score(
        replace(answers, tokens=whole_texts(enc, ["ab", "c"], ["d", "ef"]))
    )
    assert found == pytest.approx(by_tokens, abs=1e-6)


def test_a_model_whose_pad_is_the_end_is_read_where_transformers_reads_it() -> None:
    """transformers takes the score at the last token that is not pad: with pad = eos, the one before the end."""
    scorer, enc = small.scorer(), plain_encoder()
    scorer.model.config.pad_token_id = enc.eos_id
    (row,) = whole_texts(enc, ["ab"], ["d"])
    assert row.response == (enc.eos_id,)
    with torch.no_grad():
        theirs = scorer.model(input_ids=torch.tensor([row.prompt + row.response])).logits.item()
    answers = RewardBatch(["ab"], ["d"], small.rows(1), {})
    assert ModelReward("rm", scorer, 0.0, 100, encoder=enc).score(answers) == pytest.approx([theirs], abs=1e-6)
    assert scores(scorer, [row], 100) != pytest.approx([theirs], abs=1e-6)


def test_a_conversation_of_several_turns_is_read_whole() -> None:
    scorer = small.scorer()
    turns = [
        {"role": role, "content": text} for role, text in (("assistant", "ho"), ("user", "and"), ("assistant", "so"))
    ]
    (expected,) = scores(scorer, whole_texts(ENCODER, ["hi"], [turns]), 100)
    spoken = tuple(turns)
    batch = reward_batch(
        [Problem("hi", (5,), {})], ["so"], small.rows(1), [Completion((5,), (0.0,), True, messages=spoken)]
    )
    assert ModelReward("rm", scorer, 0.0, 100, encoder=ENCODER).score(batch) == [expected]
    with pytest.raises(DataError, match="rows have a column 'conversation'"):
        reward_batch(
            [Problem("hi", (5,), {"conversation": "x"})], ["so"], [], [Completion((5,), (0.0,), True, messages=spoken)]
        )


def test_a_model_with_a_shorter_context_than_the_policys_reads_the_end_and_counts_it() -> None:
    scorer, rows = small.scorer(), [Tokens((3, 4, 5, 6), (7, 8)), Tokens((3,), (4,))]
    reward = ModelReward("rm", scorer, 0.0, 100, context=4)
    found = reward.score(RewardBatch(["a", "b"], ["c", "d"], rows, {}))
    assert found == scores(scorer, [Tokens((5, 6), (7, 8)), rows[1]], 100)
    assert reward.used() == {"cut": 0.5}

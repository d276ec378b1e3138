"""Prompts and completions as token ids: prefix-exact, one beginning of sequence, a trained end of sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain.data.batches import collate
from posttrain.data.tokens import TextEncoder, table_tokens
from posttrain.errors import DataError
from posttrain.models.tiny import byte_tokenizer

END = 2


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(byte_tokenizer(64), 64)


def with_specials(closing: Sequence[str] = (), pad_is_eos: bool = False) -> TextEncoder:
    """Words as tokens, a beginning of sequence that the tokenizer adds by itself, and a merge across "a" and "b"."""
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "<pad>", "a", "b", "c", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    specials = [("<s>", 1), ("</s>", 2), ("<pad>", 3)]
    single = " ".join(["<s> $A", *closing])
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>" if pad_is_eos else "<pad>"
    )
    return TextEncoder(fast, 32)


def test_bytes_round_trip(encoder: TextEncoder) -> None:
    tokens = encoder.pair("2+2=", "é 4\n")
    assert len(tokens.prompt) == 4
    assert tokens.response[-1] == END
    assert len(tokens.response) == len("é 4\n".encode()) + 1
    assert encoder.text(tokens.response) == "é 4\n"


def test_the_prompt_is_an_exact_prefix_whatever_merges_there_are() -> None:
    encoder = with_specials()
    assert encoder.prompt("ab") == [1, 7]
    # "a" + "b" written together would merge into one token; the split keeps the prompt's ids
    tokens = encoder.pair("a", "b")
    assert tokens.prompt == (1, 4)
    assert tokens.response == (5, 2)
    assert list(tokens.prompt) == encoder.prompt("a")


def test_one_beginning_of_sequence_and_none_in_the_completion() -> None:
    encoder = with_specials()
    for prompt in ("a c", "<s> a c", "<s>a c"):
        ids = encoder.prompt(prompt)
        assert ids.count(1) == 1, prompt
        assert ids == [1, 4, 6]
    assert 1 not in encoder.completion("a c")


def test_a_tokenizer_that_closes_every_text_leaves_prompts_open_and_completions_closed_once() -> None:
    encoder = with_specials(closing=["</s>"])
    assert encoder.prompt("a c") == [1, 4, 6]
    assert encoder.completion("b") == [5, 2]


def test_end_of_sequence_is_trained_when_it_is_also_the_pad_token() -> None:
    encoder = with_specials(pad_is_eos=True)
    assert encoder.tokenizer.pad_token_id == encoder.eos_id
    batch = collate([encoder.pair("a", "b"), encoder.pair("a", "b c b")])
    assert batch.targets[0, 1].item() == encoder.eos_id
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]


def test_chat_messages_go_through_the_template_with_the_end_of_sequence_once(encoder: TextEncoder) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert encoder.tokenizer.decode(encoder.prompt(prompt)) == text
    tokens = encoder.pair(prompt, [{"role": "assistant", "content": "yes"}])
    assert tokens.response == (*encoder.tokenizer("yes")["input_ids"], END)


def test_rows_that_do_not_fit_are_named(encoder: TextEncoder) -> None:
    with pytest.raises(DataError, match=r"row 7: 66 tokens exceed the model's context of 64"):
        table_tokens(encoder, [{"id": 7, "prompt": "x" * 40, "completion": "y" * 25}], "completion")
    with pytest.raises(DataError, match="the prompt has no tokens"):
        encoder.pair("", "y")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> TextEncoder:
    folder = shared_data / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}")
    return TextEncoder(AutoTokenizer.from_pretrained(folder), 512)


@pytest.mark.real
def test_a_real_sentencepiece_tokenizer(stories: TextEncoder) -> None:
    bos = stories.tokenizer.bos_token_id
    tokens = stories.pair("Once upon a time", " there was a cat.")
    assert tokens.prompt.count(bos) <= 1
    assert bos not in tokens.response
    assert tokens.response[-1] == stories.eos_id
    assert tokens.response.count(stories.eos_id) == 1
    assert list(tokens.prompt) == stories.prompt("Once upon a time")
    assert stories.text(tokens.response).strip() == "there was a cat."
    assert stories.prompt(f"{stories.tokenizer.bos_token}Once").count(bos) <= 1


def test_the_share_of_unknown_tokens() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>"), 64)
    # a b ? and a ? ? b: 3 of 7
    assert encoder.unknown_share(["a b c", [{"role": "user", "content": "a x y b"}]]) == pytest.approx(3 / 7)
    assert encoder.unknown_share([]) == 0.0
    assert TextEncoder(byte_tokenizer(64), 64).unknown_share(["\u2603"]) == 0.0


def test_characters_that_a_tokenizer_drops_count_as_unknown() -> None:
    """A vocabulary of pieces without an unknown token leaves out the letters that it lacks."""
    pieces = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2, "\u00e9": 3}, []))
    for options in ({}, {"unk_token": "</s>"}):
        encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>", **options), 64)
        assert encoder.unknown_share(["ab \u00e9", [{"role": "user", "content": "a\u4f60 b\u597d"}]]) == 2 / 7
        assert encoder.unknown_share(["ab", "\u00e9 a"]) == 0.0
        assert encoder.unknown_share(["\u4f60\u597d"]) == 1.0


@pytest.mark.parametrize("text", ["4<|im_end|>5", "<|im_end|>4", "4<|im_end|><|im_end|>5"])
def test_an_answer_that_goes_on_after_an_end_that_it_spells_is_refused(encoder: TextEncoder, text: str) -> None:
    with pytest.raises(
        DataError, match=r"row 7: the text of the answer contains '<\|im_end\|>'.* never learn the rest"
    ):
        encoder.pair("2+2=", text, row="7")


@pytest.mark.parametrize("after", ["", "\n", "<|im_end|>", " <|im_end|>\n"])
def test_an_answer_is_trained_up_to_its_first_end(encoder: TextEncoder, after: str) -> None:
    assert encoder.pair("2+2=", f"4<|im_end|>{after}").response == encoder.pair("2+2=", "4").response


@pytest.mark.parametrize("closing", [(), ("</s>",), ("</s>", "</s>"), ("<pad>",)])
def test_what_a_tokenizer_adds_after_every_text_is_no_part_of_a_prompt(closing: tuple[str, ...]) -> None:
    encoder = with_specials(closing)
    assert encoder.prompt("a c") == [1, 4, 6]
    assert encoder.prompt("a c</s>") == [1, 4, 6, 2]  # the text's own token stays

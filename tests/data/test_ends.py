"""One set of end tokens: sampling stops at the tokens that training teaches and the folder saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AddedToken, GenerationConfig

from posttrain.data.ends import described, end_tokens, template_end
from posttrain.data.tokens import TextEncoder
from posttrain.models.folders import load_encoder, load_policy, save_model
from posttrain.models.tiny import byte_tokenizer
from posttrain.rollouts.drawing import completion
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.generate import GenerateEngine
from posttrain.rollouts.native import NativeEngine
from tests.models import small

CASES = Path(__file__).parents[2] / ".." / "shared" / "cases" / "models"
with_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the small cases are not next to the project")


def test_an_answer_ends_at_the_first_of_its_ends() -> None:
    assert completion([5, 1, 2, 7], [0.0] * 4, (2, 1)).tokens == (5, 1)
    assert completion([5, 6], [0.0] * 2, (2, 1)).finished is False


def test_ends_are_the_tokenizers_the_templates_and_the_special_ones_of_the_settings() -> None:
    tokenizer = byte_tokenizer(64)
    assert end_tokens(tokenizer, [2, 1, 70]) == {
        2: "tokenizer",
        1: "generation settings",
    }  # 70 is a byte, no special token
    tokenizer.eos_token = tokenizer.pad_token
    ends = end_tokens(tokenizer)
    assert ends == {0: "tokenizer", 2: "chat template"}
    assert described(tokenizer, ends) == "<|endoftext|> (tokenizer), <|im_end|> (chat template)"
    encoder = TextEncoder(tokenizer, 64)
    assert encoder.completion("a")[-1] == 0
    chat = encoder.tokens([{"role": "user", "content": "?"}], [{"role": "assistant", "content": "a"}])
    assert chat.response[-1] == 2
    assert encoder.completion("a<|im_end|>")[-1] == 2


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_closes_answers_is_an_end_whether_or_not_it_is_called_special(special: bool) -> None:
    tokenizer = byte_tokenizer(512)
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=special)])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end_tokens(tokenizer) == {2: "tokenizer", end: "chat template"}
    assert end_tokens(tokenizer, [end]) == end_tokens(tokenizer)
    asked, told = {"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}
    chat = TextEncoder(tokenizer, 512).tokens([asked], [told, asked, told])
    assert (chat.response[1], chat.response[-1], chat.loss_tokens) == (end, end, 4)
    tokenizer.chat_template = None
    assert end_tokens(tokenizer, [end, 70]) == {2: "tokenizer", end: "generation settings"}


def test_a_template_that_raises_has_no_end() -> None:
    tokenizer = byte_tokenizer(64)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    assert template_end(tokenizer) is None


@pytest.mark.parametrize("kind", [NativeEngine, GenerateEngine])
def test_sampling_stops_at_each_end(kind: type[NativeEngine | GenerateEngine]) -> None:
    model, asked, settings = small.language_model(), [Request((5, 6, 7), ((0,), (1,)))], SamplingSettings(12, 1.0)
    free = [c.tokens for c in kind(model, ()).sample(asked, settings)[0]]
    assert all(len(tokens) == 12 for tokens in free)
    ends = (free[0][3], free[1][5])
    for tokens, answer in zip(free, kind(model, ends).sample(asked, settings)[0], strict=True):
        first = next(i for i, token in enumerate(tokens) if token in ends)
        assert (answer.tokens, answer.finished) == (tokens[: first + 1], True)


@with_cases
@pytest.mark.parametrize(("case", "ends"), [("two_ends", (2, 1)), ("template_end_is_not_eos", (0, 2))])
def test_the_ends_of_a_folder_are_found_and_saved(case: str, ends: tuple[int, ...], tmp_path: Path) -> None:
    encoder = load_encoder(CASES / case)
    assert encoder.ends == ends
    save_model(load_policy(CASES / case), encoder.tokenizer, tmp_path / "m", "", ends=encoder.ends)
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == list(ends)
    assert load_encoder(tmp_path / "m").ends == ends


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_files_that_disagree_about_the_ends_are_shown_and_saved_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small.language_model()
    save_model(model, byte_tokenizer(64), tmp_path / "agree", "", ends=(2,))
    load_encoder(tmp_path / "agree")
    assert "disagree" not in capsys.readouterr().err
    folder = tmp_path / "other"
    save_model(model, byte_tokenizer(64), folder, "", ends=(2,))
    edit(folder / "config.json", eos_token_id=2)
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    encoder = load_encoder(folder)
    said = capsys.readouterr().err
    assert "the tokenizer's eos token is '<|endoftext|>' (0), and " in said
    assert "config.json names 2" in said
    assert encoder.ends == (0, 2)
    lm = load_policy(folder)
    save_model(lm, encoder.tokenizer, tmp_path / "saved", "", ends=encoder.ends)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "saved" / name).read_text())["eos_token_id"] == [0, 2]
    assert load_encoder(tmp_path / "saved").ends == (0, 2)
    assert "disagree" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([2, 70], "config.json names 70, an ordinary token ('"),
        ([2, 99999], "config.json names 99999, which is no token of the vocabulary"),
        ([2, -1], "config.json names -1, which is no token of the vocabulary"),
        (
            [2, *range(500, 756)],
            "config.json names 505, which is no token of the vocabulary; and 250 more. Answers end with",
        ),
    ],
)
def test_an_end_that_is_no_special_token_is_said_to_be_left_out(
    tmp_path: Path, ids: list[int], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(small.language_model(), byte_tokenizer(64), tmp_path / "m", "", ends=(2,))
    edit(tmp_path / "m" / "config.json", eos_token_id=ids)
    assert load_encoder(tmp_path / "m").ends == (2,)
    said = capsys.readouterr().err
    assert words in said
    assert len(said) < 1000


def test_texts_that_stop_answers_elsewhere_are_said_to_be_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(small.language_model(), byte_tokenizer(64), tmp_path / "m", "", ends=(2,))
    edit(tmp_path / "m" / "generation_config.json", stop_strings=["x"])
    load_encoder(tmp_path / "m")
    assert "asks for stop_strings ['x'], which are ignored here" in capsys.readouterr().err

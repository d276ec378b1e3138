"""Reference log-probabilities are computed once, and never reused for a different model, data, template or length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.models.reference import ReferenceCache
from posttrain.models.tiny import byte_tokenizer
from tests.models import small

ROWS = small.rows(6)


def other_weights(policy: Policy) -> None:
    """Change every computed number from here on, so that an unchanged number must come from disk."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_the_second_run_reads_what_the_first_computed_bit_by_bit(tmp_path: Path) -> None:
    policy, cache = small.policy(), ReferenceCache(tmp_path / "reference", "sft")
    expected = [n.logprobs for n in token_logprobs(policy, ROWS, 40)]
    first = cache.logprobs(policy, ROWS, 40)
    other_weights(policy)
    second = cache.logprobs(policy, ROWS, 40)
    assert same(first, expected)
    assert same(second, expected)
    assert {p.suffix for p in (tmp_path / "reference").iterdir()} == {".safetensors"}


def test_another_model_or_order_or_token_is_computed_anew(tmp_path: Path) -> None:
    policy, cache = small.policy(), ReferenceCache(tmp_path, "sft")
    kept = cache.logprobs(policy, ROWS, 40)
    other_weights(policy)
    assert not same(ReferenceCache(tmp_path, "another").logprobs(policy, ROWS, 40), kept)
    assert not np.array_equal(cache.logprobs(policy, ROWS[:5], 40)[0], kept[0])
    # the same ids with the border between prompt and response elsewhere
    moved = [Tokens(t.prompt[:-1], t.prompt[-1:] + t.response) for t in ROWS]
    assert [len(row) for row in cache.logprobs(policy, moved, 40)] == [len(t.response) for t in moved]
    assert len(list(tmp_path.iterdir())) == 4
    # a row's id is its name and no part of what is read
    assert same(cache.logprobs(policy, [replace(t, id="x") for t in ROWS], 40), kept)


@pytest.mark.parametrize("changed", ["data", "template", "length"])
def test_data_template_and_length_count_by_their_tokens(changed: str, tmp_path: Path) -> None:
    policy, cache = small.policy(), ReferenceCache(tmp_path, "sft")

    def rows(data: str, template: str, length: int) -> list[Tokens]:
        encoder = TextEncoder(byte_tokenizer(64), 64)
        return [Tokens(tuple(encoder.prompt(template.format(data))[-length:]), tuple(encoder.completion("yes")))]

    given = {"data": "is it?", "template": "Q: {}", "length": 6}
    other = {"data": "is it!", "template": "q: {}", "length": 5}
    # 9 characters: the template's letter is seen at full length alone
    given["length"] = 9 if changed == "template" else 6
    kept = cache.logprobs(policy, rows(**given), 40)  # type: ignore[arg-type]
    other_weights(policy)
    assert not same(cache.logprobs(policy, rows(**given | {changed: other[changed]}), 40), kept)  # type: ignore[arg-type]
    assert same(cache.logprobs(policy, rows(**given), 40), kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["torn", "short"])
def test_a_damaged_file_is_computed_again(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, cache = small.policy(), ReferenceCache(tmp_path, "sft")
    kept = cache.logprobs(policy, ROWS, 40)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[: -8 if damage == "torn" else 4])
    assert same(cache.logprobs(policy, ROWS, 40), kept)
    assert "is damaged" in capsys.readouterr().err
    other_weights(policy)
    assert same(cache.logprobs(policy, ROWS, 40), kept)


def test_no_rows_have_no_log_probabilities(tmp_path: Path) -> None:
    assert ReferenceCache(tmp_path, "sft").logprobs(small.policy(), [], 40) == []
